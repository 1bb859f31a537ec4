"""One of two processes that train an accelerated model together: `python two_ranks.py RANK DIR`."""

import sys

import torch
import torch.distributed as dist
from company import call, eager, put, tensor
from torch.nn.parallel import DistributedDataParallel


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    built = put(eager("chat"), "inference")
    wrapped = DistributedDataParallel(built)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02)
    half = {name: t[rank : rank + 1] for name, t in call(built)[1].items()}
    wrapped.train()
    for _ in range(2):
        optimizer.zero_grad()
        tensor(wrapped(**half)).square().mean().backward()
        optimizer.step()
    torch.save(built.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
