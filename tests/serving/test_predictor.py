"""Answers from a bundle in this process: arrays, texts, images, code of the user's, and language models."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import graphopt
from graphopt.backends import target
from graphopt.errors import BundleError, UsageError
from graphopt.serving import Predictor, predictor
from graphopt.serving.engine import Engine
from graphopt.serving.folders import Folder
from graphopt.serving.images import Images
from graphopt.serving.manifest import ImageSpec, TensorSpec, TextSpec
from graphopt.serving.texts import Tokenizer
from tests.models import VOCABULARY, model, padding, tokens
from tests.serving.conftest import WORDS, write_tokenizer

IDS, MASK = tokens().numpy(), padding().numpy()


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_arrays_lists_and_tensors_are_taken(encoder: Path) -> None:
    found = Predictor(encoder)
    wanted = found(ids=IDS, mask=MASK)["y"]
    for given_ids, given_mask in ((IDS.tolist(), MASK.tolist()), (tokens(), padding()), (IDS.astype("int8"), MASK)):
        assert np.array_equal(found(given_ids, given_mask)["y"], wanted)
        assert np.array_equal(found({"ids": given_ids, "mask": given_mask})["y"], wanted)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS}, "missing inputs: mask"),
        ({"ids": IDS, "mask": MASK, "maks": MASK}, "there is no input 'maks'; did you mean 'mask'?"),
        ({"ids": IDS + 0.5, "mask": MASK}, "ids is float64, and should be int64"),
        ({"ids": [["a"]], "mask": MASK}, "ids holds no numbers"),
        ({"ids": [[1], [1, 2]], "mask": MASK}, "ids is ragged"),
        ({"ids": IDS[:0], "mask": MASK[:0]}, "which holds nothing"),
    ],
)
def test_what_does_not_fit(inputs: Any, message: str, encoder: Path) -> None:
    with pytest.raises(UsageError) as raised:
        Predictor(encoder)(**inputs)
    assert message in str(raised.value)


def test_threads_may_share_one(encoder: Path) -> None:
    found, rows = Predictor(encoder), [np.full((1, length), length) for length in range(1, 17)]
    wanted = [found(row, np.ones_like(row))["y"] for row in rows]
    got: dict[int, Any] = {}

    def work(number: int) -> None:
        got[number] = found(rows[number], np.ones_like(rows[number]))["y"]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(rows))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(got[number], wanted[number]) for number in got) and len(got) == len(rows)


def test_saturation_of_another_cpu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without VNNI adds two products of uint8 and int8 in 16 bits; wide weights saturate there."""
    weight = np.full((8, 4), 127, np.int8)
    text = """g (float[n, 8] x) => (float[n, 4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, W, z)
        f = Cast<to = 1>(i)
        y = Mul(f, s)
    }"""
    onnx.save(model(text, {"W": weight}), tmp_path / "wide.onnx")
    x = np.random.default_rng(0).random((3, 8), np.float32)
    bundle = graphopt.bundle(tmp_path / "wide.onnx", tmp_path / "b", inputs=[{"x": x}])
    assert graphopt.verify(bundle).sqnr > 100

    bits = 32 if target("onnxruntime").saturates() else 16  # in which the other CPU adds

    def elsewhere(self: Engine, feeds: dict[str, Any]) -> dict[str, Any]:
        scale = np.float32(feeds["x"].max() / 255)
        products = np.rint(feeds["x"] / scale)[:, :, None] * weight
        pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
        return {"y": (pairs.sum(1) * scale).astype(np.float32)}

    monkeypatch.setattr(Engine, "run", elsewhere)
    with pytest.raises(BundleError, match="answers its golden inputs with an SQNR of"):
        graphopt.verify(bundle)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_labels_of_texts_alone_and_together(classifier: Path) -> None:
    found = Predictor(classifier)
    texts = ["w2 w3 w4", "w9", ["w5", "w6 w7"]]
    together = found.predict(texts)
    for text, table in zip(texts, together, strict=True):
        assert table == found.predict({"text": text[0], "text_pair": text[1]} if isinstance(text, list) else text)
        assert {row["label"] for row in table} == {"bad", "good", "other"}


@pytest.mark.parametrize(
    ("config", "pooling", "modules"),
    [
        ({"id2label": {"0": "score"}}, "", ""),
        ({"num_labels": 1}, "", ""),
        ({"problem_type": "multi_label_classification"}, "", ""),
        ({}, '{"pooling_mode_max_tokens": true}', ""),
        ({}, '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}', ""),
        ({}, '{"pooling_mode_mean_tokens": true}', '[{"type": "sentence_transformers.models.Dense"}]'),
    ],
)
def test_other_answers_are_the_outputs_as_they_are(
    config: dict[str, Any], pooling: str, modules: str, tmp_path: Path
) -> None:
    """A softmax over one score would be 1 for every text."""
    kind = "AModel" if pooling else "AForSequenceClassification"
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind], **config}), encoding="utf-8")
    if pooling:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(pooling, encoding="utf-8")
        (tmp_path / "modules.json").write_text(modules or "[]", encoding="utf-8")
    assert Folder.of(tmp_path).answer_spec(["logits", "last_hidden_state"]) is None


def test_a_long_text_keeps_its_last_special_token(tmp_path: Path) -> None:
    inputs = (TensorSpec("input_ids", "int64", ("b", "s")),)
    made = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path / "hf") / "tokenizer.json"))
    end = [("w9", WORDS.index("w9"))]
    made.post_processor = TemplateProcessing(single="$A w9", pair="$A w9 $B w9", special_tokens=end)
    content = made.to_str().encode()
    whole = Tokenizer(content, TextSpec("tokenizer.json", None, 0, False, ()), inputs, where="here")
    cut = Tokenizer(content, TextSpec("tokenizer.json", 6, 0, False, ()), inputs, where="here")
    for text in ("w2 " * 20, ["w3 " * 20, "w4 " * 20]):
        (long,), (short,) = whole([text]), cut([text])
        assert short["input_ids"].shape == (1, 6) and short["input_ids"][0, -1] == long["input_ids"][0, -1]
    assert len(cut.ids("w2 " * 20)) == len(whole.ids("w2 " * 20))


def test_an_embedding_is_the_mean_of_tokens(tmp_path: Path) -> None:
    origin = write_tokenizer(tmp_path / "hf", architectures=["TinyModel"])
    (origin / "1_Pooling").mkdir()
    (origin / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    (origin / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]', encoding="utf-8")
    text = """g (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 4] last_hidden_state) {
        e = Gather(T, input_ids)
        axes = Constant<value = int64[1] {2}>()
        m = Cast<to = 1>(attention_mask)
        u = Unsqueeze(m, axes)
        last_hidden_state = Mul(e, u)
    }"""
    table = torch.randn(VOCABULARY, 4)
    onnx.save(model(text, {"T": table}), tmp_path / "m.onnx")
    batch = {"input_ids": tokens(), "attention_mask": padding()}
    bundle = graphopt.bundle(tmp_path / "m.onnx", tmp_path / "b", tokenizer=origin, inputs=[batch])
    wanted = table[[2, 5]].mean(0)
    found = Predictor(bundle).predict(["w2 w5", "w3"])
    assert found[0] == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-5)
    assert np.linalg.norm(found[1]) == pytest.approx(1)


# --- images -----------------------------------------------------------------------------------------------------------


def picture(size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a classifier of images: the mean of each color is a logit."""
    folder = tmp_path_factory.mktemp("images")
    origin = folder / "hf"
    origin.mkdir()
    labels = {"0": "red", "1": "green", "2": "blue"}
    config = {"architectures": ["TinyForImageClassification"], "id2label": labels}
    (origin / "config.json").write_text(json.dumps(config), encoding="utf-8")
    transforms = {"size": {"shortest_edge": 6}, "do_center_crop": True, "crop_size": 4, "image_mean": [0.5] * 3,
                  "image_std": [0.25] * 3, "rescale_factor": 1 / 255, "resample": 2}  # fmt: skip
    (origin / "preprocessor_config.json").write_text(json.dumps(transforms), encoding="utf-8")
    text = """g (float[b, 3, 4, 4] pixel_values) => (float[b, 3] logits) {
        p = GlobalAveragePool(pixel_values)
        logits = Flatten(p)
    }"""
    onnx.save(model(text), origin / "model.onnx")
    return graphopt.bundle(origin / "model.onnx", folder / "b")


def test_images_in_all_forms(classes: Path) -> None:
    from PIL import Image

    found, content = Predictor(classes), picture()
    encoded = base64.b64encode(content).decode()
    forms = [content, Image.open(io.BytesIO(content)), encoded, f"data:image/png;base64,{encoded}", {"b64": encoded}]
    answers = found.predict(forms)
    assert all(one == answers[0] for one in answers) and {row["label"] for row in answers[0]} == {
        "red",
        "green",
        "blue",
    }


def test_an_image_is_transformed_as_pillow_does_it(classes: Path) -> None:
    from PIL import Image

    found = Predictor(classes).prepared([picture()])[0]["pixel_values"]
    resized = np.asarray(Image.open(io.BytesIO(picture())).resize((12, 6), 2), np.float32)
    wanted = ((resized[1:5, 4:8] / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None]
    assert found.shape == (1, 3, 4, 4) and np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("given", [b"", b"\x89PNG", picture()[:60], "no base64!", 7, None])
def test_what_is_no_image(given: Any, classes: Path) -> None:
    with pytest.raises(UsageError, match="image"):
        Predictor(classes).predict([given])


def test_an_image_with_too_many_pixels_is_not_decoded(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.serving.images.MOST_PIXELS", 100)
    with pytest.raises(UsageError, match="the image has 20 x 10 pixels; the most is 100"):
        Predictor(classes).predict(picture())


@given(width=st.integers(1, 40), height=st.integers(1, 40), edge=st.integers(1, 30), crop=st.integers(1, 30))
def test_an_image_of_any_size_fits(width: int, height: int, edge: int, crop: int) -> None:
    spec = ImageSpec("x", (edge,), (crop, crop), 2, 1.0, (0.0,) * 3, (1.0,) * 3)
    assert Images(spec, (), where="here")([picture((width, height))])[0]["x"].shape == (1, 3, crop, crop)


# --- code of the user's -----------------------------------------------------------------------------------------------


class Steps:
    """Numbers in text -> tokens; the largest output."""

    def before(self, items: Sequence[Any]) -> list[dict[str, Any]]:
        rows = [np.array([[int(part) for part in item.split()]]) for item in items]
        return [{"ids": row, "mask": np.ones_like(row)} for row in rows]

    def after(self, outputs: dict[str, Any]) -> float:
        return float(outputs["y"].max())


def test_code_is_an_entry_point(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = EntryPoint("numbers", f"{__name__}:Steps", predictor.CODE)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Steps)
    monkeypatch.setattr(predictor, "entry_points", lambda group: EntryPoints([one]))
    batch = {"ids": tokens(), "mask": padding()}
    bundle = graphopt.bundle(model_file, tmp_path / "b", code="numbers", inputs=[batch])
    found = Predictor(bundle)
    assert found.predict(["3 4", "5"]) == [found.predict("3 4"), found.predict("5")]
    with pytest.raises(UsageError, match="your code numbers failed: ValueError"):
        found.predict("three")
    monkeypatch.setattr(predictor, "entry_points", lambda group: EntryPoints([]))
    with pytest.raises(BundleError, match="needs the code 'numbers', which no installed package has"):
        Predictor(bundle)


# --- language models --------------------------------------------------------------------------------------------------


def test_generate(writer: Path) -> None:
    found = Predictor(writer)
    assert found.generate("w2", max_tokens=4) == "w3 w4 w5 w6"
    pieces = found.generate("w2", max_tokens=4, stream=True)
    assert isinstance(pieces, Iterator) and list(pieces) == ["w3", " w4", " w5", " w6"]
    assert found.generate("w2", stop=["w9", "w5"]) == "w3 w4 "
    assert found.generate("w2", temperature=0, max_tokens=2) == "w3 w4"
    drawn = {found.generate("w2", top_p=1.0, temperature=50.0, seed=seed, max_tokens=1) for seed in range(9)}
    assert len(drawn) > 3


@given(top_p=st.floats(0.01, 1), seed=st.integers(0, 9), size=st.integers(1, 50))
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(top_p: float, seed: int, size: int) -> None:
    from graphopt.serving.generation import _chooser

    logits = np.random.default_rng(seed).normal(size=size).astype(np.float32) * 3
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum()
    token = _chooser(None, top_p, seed)(logits)
    assert shares[shares > shares[token]].sum() < top_p + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_decoder_writes_what_transformers_writes(cache: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    gpt.eval()
    gpt.save_pretrained(tmp_path / "gpt")
    own = json.loads((tmp_path / "gpt" / "config.json").read_text(encoding="utf-8"))
    write_tokenizer(tmp_path / "gpt", WORDS, **own)
    prompt = torch.tensor([[5, 9, 12, 7]])
    small = graphopt.optimize(str(tmp_path / "gpt"), example_inputs={"input_ids": prompt}, cache=cache, measure=False)
    found = Predictor(small.bundle(tmp_path / "b"))
    wanted = gpt.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, 4:].tolist()
    words = [WORDS[one] for one in wanted if one != 1]
    assert found.generate("w5 w9 w12 w7", max_tokens=12).split() == words
