"""One rank of the demo; it does what a training script does before the training."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed as dist

import weightferry
from weightferry.cluster.connect import process_group_coordinator
from weightferry.phases.job_request import RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest
from weightferry.staging import collect
from weightferry.testing.demo import RankFinding

SENTENCE = "Weights travel once, and every rank has them."


def main(repo: str, out: Path) -> None:
    """Stage the repository, build the module, load it, run it, and write the result to `out`."""
    dist.init_process_group("gloo")
    # The same as weightferry.stage(repo), but it also returns the report.
    settings = Settings.from_environ()
    with process_group_coordinator(settings, "stage") as coordinator:
        collected = collect(lambda: RankRequest({"": SourceRequest.of(repo)}), coordinator, settings)
    folder = collected.paths[""]
    model = _module(folder)
    pretrainer = weightferry.Pretrainer(
        collect_in=None, loadables={"model": model}, paths={"model": str(folder / "model.safetensors")}
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    finding = _run_model(model, folder)
    (out / f"rank{finding.rank}.json").write_text(json.dumps(asdict(finding)))
    if finding.rank == 0:
        collected.report.write(out / "report.json")
    dist.destroy_process_group()


def _module(folder: Path) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(dist.get_rank())  # without the load, the weights differ between ranks
    module: torch.nn.Module = BertModel(BertConfig.from_json_file(folder / "config.json"))
    return module.train(mode=False)


def _run_model(model: torch.nn.Module, folder: Path) -> RankFinding:
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SENTENCE)
    with torch.no_grad():
        output = model(torch.tensor([encoded.ids]), attention_mask=torch.tensor([encoded.attention_mask]))
    vector = output.last_hidden_state.mean(dim=1)[0]
    with (folder / "model.safetensors").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    digest = hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    return RankFinding(dist.get_rank(), sha256.hexdigest(), digest, [round(v, 6) for v in vector[:3].tolist()])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
