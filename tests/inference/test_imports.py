"""Bundles open without fairseq and its dependencies, and `import nmt_moe` is fast."""

import subprocess
import sys
from pathlib import Path

import pytest

from nmt_moe.inference import Description, SearchDefaults
from tests.support.bundles import LM, make_bundle

BLOCKED = ["fairseq", "omegaconf", "hydra", "antlr4", "fairscale", "triton", "pooch"]
BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Blocker())
"""
USE = """
try:
    import fairseq
except ModuleNotFoundError:
    print("blocked")

from nmt_moe import LanguageModel, Translator
from nmt_moe.cli import main
from nmt_moe.inference import verify_bundle

translation, language_model = sys.argv[1:]
[result] = Translator.load(translation).translate("the cat", with_experts=True)
assert result.text
[score] = LanguageModel.load(language_model).score("the cat")
assert score.log_prob < 0
heavy = {"torch._dynamo", "torch._inductor", "sentencex", "sacremoses", "sacrebleu"}
print(sorted(heavy & set(sys.modules)))
print(verify_bundle(translation))
main(["translate", translation, "--no-progress"], standalone_mode=False)
"""


def run(code: str, *arguments: object, stdin: str = "") -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bundles_need_no_fairseq_and_import_nothing_slow(tmp_path: Path):
    short = Description(search=SearchDefaults(max_len_b=6))
    translation, _ = make_bundle(tmp_path / "translation", description=short)
    language_model, _ = make_bundle(tmp_path / "lm", LM)
    lines = run(BLOCK + USE, translation, language_model, stdin="the cat\n\na dog\n").split("\n")
    assert lines[:2] == ["blocked", "[]"]
    assert lines[2].startswith("complete: translation")
    assert [bool(line) for line in lines[3:]] == [True, False, True, False]


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, nmt_moe; print(sorted({'torch', 'numpy', 'fairseq'} & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    import nmt_moe

    with pytest.raises(AttributeError, match="has no attribute `Nothing`"):
        _ = nmt_moe.Nothing
