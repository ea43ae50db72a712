"""A recipe as people have it, with one line exchanged: the Pretrainer in the hyperparameters."""

from __future__ import annotations

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import run_on_main

HYPERPARAMETERS = """
save: !PLACEHOLDER
model: !new:torch.nn.Linear
  in_features: 4
  out_features: 4
pretrainer: !new:weightferry.Pretrainer
  collect_in: !ref <save>
  loadables:
    model: !ref <model>
  paths:
    model: org/model/model.ckpt
"""

if __name__ == "__main__":
    save, when, out = sys.argv[1:]
    hparams = load_hyperpyyaml(HYPERPARAMETERS, {"save": save})
    if when == "group first":
        sb.utils.distributed.ddp_init_group({"distributed_backend": "gloo"})

    run_on_main(hparams["pretrainer"].collect_files)
    hparams["pretrainer"].load_collected()

    if when == "group later":
        sb.utils.distributed.ddp_init_group({"distributed_backend": "gloo"})
    model = torch.nn.parallel.DistributedDataParallel(hparams["model"])
    result = model(torch.ones(1, 4)).tolist()
    Path(out, f"rank{torch.distributed.get_rank()}").write_text(str(result))
    torch.distributed.destroy_process_group()
