"""Bundles are opened without fairseq and what belongs to it; `import nmt_moe` takes no time."""

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
from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import verify_bundle

translation, language_model = sys.argv[1:]
print(verify_bundle(translation))
[result] = Translator.load(translation).translate("the cat", with_experts=True)
assert result.text
[score] = LanguageModel.load(language_model).score("the cat")
assert score.log_prob < 0
"""
COMMAND = """
from nmt_moe.cli import main
main(["translate", sys.argv[1], "--no-progress"], standalone_mode=False)
"""


def run(code: str, *arguments: object, stdin: str = "") -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    short = Description(search=SearchDefaults(max_len_b=6))
    return make_bundle(tmp_path_factory.mktemp("imports"), description=short)[0]


def test_bundles_need_no_fairseq(bundle: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match="No module named 'fairseq'"):
        run(BLOCK + "import fairseq.tasks")
    language_model, _ = make_bundle(tmp_path, LM)
    assert "whole" in run(BLOCK + USE, bundle, language_model)
    assert run(BLOCK + COMMAND, bundle, stdin="the cat\n\na dog\n").count("\n") == 3


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, nmt_moe; print(sorted({'torch', 'numpy', 'fairseq'} & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_opening_a_bundle_imports_no_compiler_and_no_splitter(bundle: Path):
    heavy = "{'torch._dynamo', 'torch._inductor', 'sentencex', 'sacremoses', 'sacrebleu'}"
    code = (
        "import sys; from nmt_moe import Translator; Translator.load(sys.argv[1]).translate('cat');"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert run(code, bundle) == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    import nmt_moe

    with pytest.raises(AttributeError, match="has no attribute `Nothing`"):
        _ = nmt_moe.Nothing
