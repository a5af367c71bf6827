"""One of two ranks: meets the other as training does, and says where this process listens."""

from __future__ import annotations

import os

import psutil
import torch
from torch import distributed

from pipelines.training.distributed import Ranks, meet

if __name__ == "__main__":
    meet()
    distributed.init_process_group("gloo")
    ranks = Ranks.current(torch.device("cpu"))
    assert ranks.gathered(float(ranks.rank + 1)) == [1.0, 2.0]
    addresses = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
    print("listens on", *sorted(addresses), "store", os.environ["MASTER_PORT"], flush=True)
    ranks.barrier()
    distributed.destroy_process_group()
