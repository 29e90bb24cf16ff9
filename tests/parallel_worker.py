"""One process of a training: python -m tests.parallel_worker FOLDER BATCH_SIZE; RANK and WORLD_SIZE as torchrun sets them."""
import sys
from pathlib import Path

import torch
from torch import nn

from fer_nb.artifacts import write_text
from fer_nb.callbacks import TrainConfig, seed_everything
from fer_nb.loading import make_loaders
from fer_nb.parallel import AverageGradients, joined, own_folder
from fer_nb.training import open_data, train


def small_net():
    "A network without batch-norm."
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7))


def cross_entropy(z, y, index, view): return nn.functional.cross_entropy(z, y)


if __name__ == "__main__":
    folder, batch_size, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with joined() as (rank, world), own_folder(folder/"run", rank) as run:
        data = open_data(folder/"manifests", folder/"cache", "hq_train", "synthetic_studio")
        seed_everything(7 + rank)  # other weights in each: those of the first count
        cfg = TrainConfig(3, 3e-3, warmup_epochs=0.5, accumulate=accumulate, clip=1.0, seed=7)
        loaders = make_loaders(data.train, data.own_val, batch_size, 7, None, rank=rank, world_size=world)
        net = small_net()
        train(net, *loaders, cross_entropy, cfg, run, {}, [AverageGradients()] if world > 1 else [], bar=False)
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        torch.save(weights, folder/f"weights_{rank}.pt")
        write_text(folder/f"wrote_{rank}.txt", str(run))
