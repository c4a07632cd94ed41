#!/usr/bin/env bash
# omegaconf 2.4.0, PyYAML 6.0.3: texts that do not come back from a YAML file. Seen 2026-11.
#
# Expected: an escaped interpolation, \${x}, means the text ${x}, whichever way the file is read.
# Seen: to_container(resolve=True) does that. OmegaConf.resolve(config) writes the unescaped text back into the config,
# where it counts as an interpolation: \${x} is then read as the value of x, silently, and one that does not parse,
# such as \${a b}, makes resolve raise GrammarParseError. No escape holds for a reader whose way one does not know.
#
# Expected: a text that yaml.safe_dump writes is read back as the same text.
# Seen: safe_dump writes '1e5' without quotes, since YAML 1.1 floats need a dot; OmegaConf reads it as the float
# 100000.0.
# Output seen:
#   omegaconf 2.4.0 PyYAML 6.0.3
#   \${x}: to_container gives '${x}', resolve gives 1
#   \${a b}: to_container gives '${a b}', resolve gives 'GrammarParseError'
#   '1e5': written 'text: 1e5', read by PyYAML '1e5', by OmegaConf 100000.0
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet omegaconf==2.4.0 pyyaml==6.0.3
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

print("omegaconf", version("omegaconf"), "PyYAML", version("PyYAML"))
seen = []
for text in (r"\${x}", r"\${a b}"):
    seen.append(OmegaConf.to_container(OmegaConf.create({"text": text, "x": 1}), resolve=True)["text"])
    config = OmegaConf.create({"text": text, "x": 1})
    try:
        OmegaConf.resolve(config)
        seen.append(config.text)
    except GrammarParseError as error:
        seen.append(type(error).__name__)
    print(f"{text}: to_container gives {seen[-2]!r}, resolve gives {seen[-1]!r}")
written = yaml.safe_dump({"text": "1e5"})
seen += [written.strip(), yaml.safe_load(written)["text"], OmegaConf.create(written).text]
print(f"'1e5': written {seen[-3]!r}, read by PyYAML {seen[-2]!r}, by OmegaConf {seen[-1]!r}")
if seen != ["${x}", 1, "${a b}", "GrammarParseError", "text: 1e5", "1e5", 100000.0]:
    sys.exit("behaviour has changed: escapes or numbers in texts of omegaconf and PyYAML")
EOF
