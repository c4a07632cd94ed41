"""The installed package tells type checkers its types."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

SCRIPT = """
import glp_lens as gl

reveal_type(gl.load("models/glp"))
reveal_type(gl.GLP.from_pretrained("models/glp"))
wrong: int = gl.load("models/glp").save_pretrained("out")
gl.recipe(rows="many")
"""
# Other packages are passed over, which makes this a matter of seconds.
CONFIG = "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-glp_lens.*]\nfollow_imports = silent\n"


def test_a_users_script_is_checked_against_the_installed_package(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "mine.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert done.stderr == ""
    assert [each for each in said if "py.typed" in each or "import" in each] == []
    assert 'Revealed type is "glp_lens.artifacts.ActivationModel"' in said[0]
    assert 'Revealed type is "glp_lens.models.glp.GLP"' in said[1]
    assert "[assignment]" in said[2]
    assert {each.partition(":")[2].partition(":")[0] for each in said[3:-1]} == {"7"}
    assert done.returncode == 1
