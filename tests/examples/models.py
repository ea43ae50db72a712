"""Tiny models, made on the spot: repositories for the examples, and the line that a rank prints that holds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] one small step a giant leap weights on every node no rank waits for ever"
SENTENCES = ["one small step", "weights on every node", "a giant leap", "no rank waits for ever"]


def fingerprint(module: torch.nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


def config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=64,
        max_position_embeddings=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )


def base() -> Any:
    """The same weights every time."""
    from transformers import BertModel

    torch.manual_seed(1)
    return BertModel(config())


def bert(folder: Path) -> str:
    model = base()
    model.save_pretrained(folder)
    return f"fingerprint {fingerprint(model):.6f}"


def masked_bert(folder: Path) -> str:
    from transformers import BertForMaskedLM

    torch.manual_seed(2)
    model = BertForMaskedLM(config())
    model.save_pretrained(folder)
    return f"fingerprint {fingerprint(BertForMaskedLM.from_pretrained(folder)):.6f}"


def adapter(folder: Path) -> str:
    """An adapter for `bert`."""
    from peft import LoraConfig, get_peft_model

    model = base()
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    model.save_pretrained(folder)
    return f"fingerprint {fingerprint(model):.6f}"


def sharded(folder: Path) -> str:
    """A sequence of four linear layers, in two files and their index."""
    from safetensors.torch import save_file

    torch.manual_seed(4)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers)
    state = model.state_dict()
    weight_map: dict[str, str] = {}
    folder.mkdir(parents=True)
    for number, names in enumerate((list(state)[:4], list(state)[4:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"fingerprint {fingerprint(model):.6f}"


def distributed_checkpoint(folder: Path) -> str:
    """A module and its optimizer after seven steps, saved by one process."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(7):
        model(torch.randn(4, 32)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(7)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return f"fingerprint {fingerprint(model):.6f} at step 7"


def sentence_encoder(folder: Path) -> str:
    """A BERT with mean pooling and a tokenizer of words."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS.split())}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    parts = folder.with_name(f"{folder.name}-parts")
    base().save_pretrained(parts)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(parts)
    model = SentenceTransformer(modules=[Transformer(str(parts)), Pooling(16)], device="cpu")
    model.save(str(folder))
    return f"fingerprint {np.abs(model.encode(SENTENCES)).sum():.4f}"


def linear(folder: Path) -> str:
    """The state of one layer, as SpeechBrain saves it."""
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 4)
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "model.ckpt")
    return f"fingerprint {fingerprint(model):.6f}"
