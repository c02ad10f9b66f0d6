"""The command `nmt-moe experts`, called as a user would call it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from nmt_moe import LanguageModel, Translator
from nmt_moe.cli import main
from nmt_moe.inference import Pieces, export, total_score
from nmt_moe.inspection import Part
from nmt_moe.resizing import shares, survey
from tests.support.bundles import GNMT, LM, make_bundle, make_checkpoint, write_text


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["experts", *map(str, words)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a checkpoint, its bundle, a text and its references."""
    folder = tmp_path_factory.mktemp("experts")
    path, data, pieces, _ = make_checkpoint(folder)
    export(path, data, Pieces(pieces), folder / "bundle")
    text = write_text(folder / "dev.aa", 30)
    reference = folder / "dev.bb"
    reference.write_text("".join(f"{x[::-1]}\n" for x in text.read_text().splitlines()))
    return path, folder / "bundle", text, reference


def test_shares_match_their_definition(files):
    """Compare the shares with counts and sums that are computed token by token."""
    _, bundle, text, reference = files
    lines, others = (path.read_text().splitlines()[:8] for path in (text, reference))
    translator = Translator.load(bundle)
    found = survey(translator, Part("dev", lines, others))
    layer = translator.moe_layers["decoder"]
    wanted = {"load": [0.0] * 6, "importance": [0.0] * 6, "contribution": [0.0] * 6}
    for score in translator.score(lines, others, with_experts=True, with_inputs=True):
        routing = score.target.routing
        for x, ids, gates in zip(routing.inputs, routing.expert_ids, routing.gates, strict=True):
            for expert, gate in zip(ids.tolist(), gates.tolist(), strict=True):
                output = layer.expert_outputs(x.unsqueeze(0), [expert])
                wanted["load"][expert] += 1
                wanted["importance"][expert] += gate
                wanted["contribution"][expert] += gate * float(output.norm())
    for criterion, values in wanted.items():
        share = shares([found], criterion)["decoder"].tolist()
        assert share == pytest.approx([value / sum(values) for value in values], rel=1e-5)


def test_texts_can_be_weighted_equally(files):
    _, bundle, text, _ = files
    lines = text.read_text().splitlines()
    translator = Translator.load(bundle)
    found = [survey(translator, Part("dev", part)) for part in (lines[:20], lines[20:22])]
    single = [shares([one], "load")["encoder"] for one in found]
    equal = shares(found, "load", is_equal=True)["encoder"]
    torch.testing.assert_close(equal, (single[0] + single[1]) / 2)
    counts = [one.layers["encoder"].usage.load.double() for one in found]
    pooled = shares(found, "load")["encoder"]
    torch.testing.assert_close(pooled, (counts[0] + counts[1]) / (counts[0] + counts[1]).sum())


def test_statistics_are_printed(files):
    _, bundle, text, reference = files
    words = ["stats", bundle, "--text", text, "--reference", reference]
    content = json.loads(run(*words, "--json"))
    assert content.keys() == {"encoder", "decoder"}
    assert sum(content["decoder"]["shares"]["contribution"]) == pytest.approx(1)
    assert sum(content["decoder"]["load"]) == 2 * content["decoder"]["num_tokens"]
    printed = run(*words)
    assert f"decoder: {content['decoder']['num_tokens']} tokens, 6 experts" in printed
    assert printed.count(" %") == 2 * 6 * 3


def test_a_bundle_is_pruned_and_both_perplexities_are_printed(files, tmp_path):
    _, bundle, text, reference = files
    output = tmp_path / "pruned"
    printed = run(
        *("prune", bundle, "--num-experts", 3, "--text", text, "--reference", reference),
        *("--output", output),
    )
    lines, others = (path.read_text().splitlines() for path in (text, reference))
    found = [
        total_score([one.target for one in Translator.load(x).score(lines, others)])
        for x in (bundle, output)
    ]
    before, after = (f"{one.perplexity_per_piece:.3f}" for one in found)
    assert f"perplexity per piece: {before} before, {after} after" in printed
    assert before != after
    assert "encoder: kept 3 of 6" in printed
    assert "Pruned by contribution on dev.aa" in (output / "README.md").read_text()


@pytest.mark.parametrize("command", ["prune", "merge"])
def test_a_checkpoint_and_its_bundle_are_changed_alike(files, tmp_path, command):
    path, bundle, text, reference = files
    words = ["--num-experts", 3, "--scope", "model", "--text", text, "--reference", reference]
    of_bundle = run(command, bundle, *words, "--output", tmp_path / "small")
    of_checkpoint = run(
        command, path, *words, "--bundle", bundle, "--output", tmp_path / "small.pt"
    )
    assert of_bundle.splitlines()[:-1] == of_checkpoint.splitlines()[:-1]
    assert "perplexity per piece" in of_bundle


def test_without_references_no_perplexity_is_reported(files, tmp_path):
    _, bundle, text, _ = files
    printed = run("prune", bundle, "--num-experts", 4, "--text", text, "--output", tmp_path / "x")
    assert "perplexity: not measured, because it needs a `--reference`" in printed


def test_a_language_model_needs_no_reference(tmp_path):
    bundle, _ = make_bundle(tmp_path, LM)
    text = write_text(tmp_path / "dev", 20)
    printed = run("prune", bundle, "--num-experts", 2, "--text", text, "--output", tmp_path / "x")
    score = total_score(LanguageModel.load(bundle).score(text.read_text().splitlines()))
    assert f"perplexity per piece: {score.perplexity_per_piece:.3f} before" in printed


def test_languages_of_a_multilingual_model(tmp_path):
    bundle, _ = make_bundle(tmp_path, languages="aa bb")
    text = write_text(tmp_path / "dev", 10)
    words = ["prune", bundle, "--num-experts", 3, "--equal-texts", "--output", tmp_path / "x"]
    both = ["--text", text, text, "--target-lang", "bb", "aa"]
    assert "kept 3 of 6" in run(*words, *both)
    assert "`--target-lang` must be one of aa, bb, but is missing" in run(
        *words, "--text", text, "--overwrite", status=1
    )
    assert "`--text` takes 1 or 3 values for 3 parts, but was given 2" in run(
        *words, *both, "aa", "--overwrite", status=1
    )


def test_a_dense_model_is_upcycled(tmp_path):
    dense = replace(GNMT, moe=replace(GNMT.moe, num_experts=1, top_k=1))
    path, data, pieces, _ = make_checkpoint(tmp_path, dense)
    export(path, data, Pieces(pieces), tmp_path / "bundle")
    text = write_text(tmp_path / "dev", 10)
    printed = run(
        *("upcycle", path, "--num-experts", 8, "--top-k", 2, "--output", tmp_path / "moe.pt"),
        *("--text", text, "--reference", text, "--bundle", tmp_path / "bundle"),
    )
    lines = [line for line in printed.splitlines() if "outputs differ by" in line]
    differences = [float(line.split()[-2]) for line in lines]
    assert len(differences) == 2
    assert max(differences) < 1e-12
    before, after = (
        float(word) for word in printed.split("per piece: ")[1].split() if word[0].isdigit()
    )
    assert math.isclose(before, after, rel_tol=1e-4)
    export(tmp_path / "moe.pt", data, Pieces(pieces), tmp_path / "grown")
    assert Translator.load(tmp_path / "grown").moe_layers["encoder"].config.num_experts == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "BUNDLE", "--num-experts", "7"], "must be from 2 to 6, but is 7"),
        (["prune", "CHECKPOINT", "--num-experts", "3"], "name the bundle that `nmt-moe export`"),
        (["prune", "BUNDLE", "--num-experts", "3", "--bundle", "BUNDLE"], "only for checkpoints"),
        (["prune", "OTHER", "--num-experts", "3", "--bundle", "BUNDLE"], "its gates differ"),
        (["upcycle", "BUNDLE", "--num-experts", "9", "--top-k", "2"], "only a single expert"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(files, tmp_path, words, message):
    path, bundle, text, _ = files
    other, *_ = make_checkpoint(tmp_path / "other", seed=2)
    paths = {"BUNDLE": bundle, "CHECKPOINT": path, "OTHER": other}
    words = [str(paths.get(word, word)) for word in words]
    output = tmp_path / "output"
    assert message in run(*words, "--text", text, "--output", output, status=1)
    assert not output.exists()


def test_merging_names_the_package_it_needs(files, tmp_path, monkeypatch):
    _, bundle, text, _ = files
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    words = ["merge", bundle, "--num-experts", 3, "--text", text, "--output", tmp_path / "x"]
    assert "Run `pip install 'nmt-moe[experts]'`" in run(*words, status=1)


def test_a_text_without_words_is_refused(files, tmp_path):
    bundle = files[1]
    (tmp_path / "blank").write_text("\n \n")
    words = ["stats", bundle, "--text", tmp_path / "blank"]
    assert "all lines (2) are empty" in run(*words, status=1)
    with pytest.raises(ValueError, match="the text has no line with words"):
        survey(Translator.load(bundle), Part("dev", ["", " "]))


def test_upcycling_without_a_text_needs_no_bundle(files, tmp_path):
    path, bundle, _, _ = files
    words = ["upcycle", path, "--num-experts", 8, "--top-k", 2, "--output", tmp_path / "x"]
    assert "`--bundle` need `--text`" in run(*words, "--bundle", bundle, status=1)
