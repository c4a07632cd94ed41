#!/usr/bin/env bash
# datasets 5.2.0: without declared features, streamed rows are changed to fit, silently. Seen 2026-11.
#
# Expected: load_dataset("json" or "csv", streaming=True) gives the values that stand in the files, or raises.
# Seen: the first file sets the types, and rows of later files are cast to them: after {"label": true}, 5 is True;
# after "z", 1 is "1"; after a text, the text "2024-01-01" is "2024-01-01 00:00:00". In one jsonl file, 2**53 + 1
# beside 0.5 loses its last digit, and texts that are all ISO dates come as datetimes (texts of csv do not). In csv the
# texts NA, null, None and nan become None, and a column of texts such as 007 becomes integers. The order of the files
# matters: 5 before true gives 5 and 1. Other casts do raise (0.5 and then 2**53 + 1, ArrowInvalid).
# Output seen:
#   datasets 5.2.0 pyarrow 26.0.1
#   true, then 5: [True, True]
#   5, then true: [5, 1]
#   'z', then 1: ['z', '1']
#   a text, then a date: ['hello', '2024-01-01 00:00:00']
#   0.5 with 2**53 + 1: [0.5, 9007199254740992.0]
#   dates: ['datetime', 'datetime']
#   csv texts: [None, None, None, None, 'hello']
#   csv digits: [7, 10]
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0
"$work/venv/bin/python" - "$work" <<'EOF'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset

print("datasets", version("datasets"), "pyarrow", version("pyarrow"))


def stream(kind, *files):
    paths = []
    for lines in files:
        paths.append(f"{sys.argv[1]}/{len(list(Path(sys.argv[1]).iterdir()))}.{kind}")
        Path(paths[-1]).write_text("\n".join(v if kind == "csv" else json.dumps({"v": v}) for v in lines) + "\n")
    rows = load_dataset(kind, data_files=paths, split="train", streaming=True)
    return [row["v"] for row in rows]


seen = {
    "true, then 5": stream("json", [True], [5]),
    "5, then true": stream("json", [5], [True]),
    "'z', then 1": stream("json", ["z"], [1]),
    "a text, then a date": stream("json", ["hello"], ["2024-01-01"]),
    "0.5 with 2**53 + 1": stream("json", [0.5, 2**53 + 1]),
    "dates": [type(v).__name__ for v in stream("json", ["2024-01-01", "2024-02-01"])],
    "csv texts": stream("csv", ["v", "NA", "null", "None", "nan", "hello"]),
    "csv digits": stream("csv", ["v", "007", "010"]),
}
for name, values in seen.items():
    print(f"{name}: {values}")
expected = [
    [True, True], [5, 1], ["z", "1"], ["hello", "2024-01-01 00:00:00"], [0.5, float(2**53)], ["datetime", "datetime"],
    [None, None, None, None, "hello"], [7, 10],
]
changed = [name for (name, values), was in zip(seen.items(), expected, strict=True) if repr(values) != repr(was)]
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
