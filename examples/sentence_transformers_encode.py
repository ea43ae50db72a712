"""Stage a sentence-transformers model, and encode a part of the sentences on every rank.

torchrun --nproc-per-node 2 examples/sentence_transformers_encode.py org/name
"""

from __future__ import annotations

import sys

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import distributed as dist

import weightferry

SENTENCES = ["one small step", "a giant leap", "weights on every node", "no rank waits for ever"]


def main(source: str) -> None:
    """Stage, load, encode, gather."""
    model = SentenceTransformer(str(weightferry.stage(source)), device="cpu")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts: list[np.ndarray | None] = [None] * world_size
    dist.all_gather_object(parts, model.encode(SENTENCES[rank::world_size]))
    whole = np.concatenate([part for part in parts if part is not None])
    assert whole.shape[0] == len(SENTENCES)
    everything = model.encode([sentence for start in range(world_size) for sentence in SENTENCES[start::world_size]])
    assert np.allclose(whole, everything, atol=1e-5), "the ranks encode differently"
    print(f"rank {rank}: fingerprint {np.abs(everything).sum():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
