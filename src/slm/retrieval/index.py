"""One search for the keys nearest to a point, and two engines for it.

Both forms of DTKR are nearest-neighbour searches by Euclidean distance, so one metric serves both: the
gaussian form's points are whitened and projected, y = Wᵀ (q − μ_0) (method section 2b); the cosine form's are
the concatenation of G slices of unit length, for which |p − k|² = 2G − 2 pᵀk (method section 2a).

An engine proposes candidates; what it returns is computed anew from them in float64, one row and one key
at a time, and sorted by distance, then by key number. So the distances of a row are exact, and what the
exact engine returns does not depend on the other rows of the batch.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from types import ModuleType
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.config import RetrievalConfig
from slm.errors import ConfigError

NUM_KEYS_FOR_VECTOR = 30_000
"""``auto`` takes the vector index from this many keys on, where the exact one passes 2 ms a row.

The vector index is faster from a few thousand keys on (``benchmarks/retrieval_cost.py``), but it has to be
built anew for every version of the store and may miss a key, so it has to save something that is felt.
"""

_SLACK = 16
"""Keys that the float32 pass keeps beyond those asked for, so that its rounding seldom matters."""
_CHUNK = 1 << 22
"""Numbers held at once where all keys are scored in float64."""


class KeyIndex(ABC):
    """Finds the keys nearest to points.

    Args:
        keys: (N, J) float64, key points, N ≥ 1.
    """

    def __init__(self, keys: Float[Tensor, "N J"]) -> None:
        self.keys = keys

    def search(
        self, points: Float[Tensor, "B J"], num: int
    ) -> tuple[Float[Tensor, "B M"], Int[Tensor, "B M"]]:
        """The M nearest keys of each point, M = min(num, N).

        Args:
            points: (B, J) float64, on the CPU.
            num: how many keys, at least 1.

        Returns:
            Squared distances, (B, M) float64, smallest first, and key numbers, (B, M) int64; of equally
            distant keys the one of smaller number comes first.
        """
        num = min(num, len(self.keys))
        if num == len(self.keys):
            return nearest(all_distances(points, self.keys), num)
        return self._search(points, num)

    @abstractmethod
    def _search(self, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """:meth:`search` for num < N."""


@final
class ExactIndex(KeyIndex):
    """All keys, the whole batch at once, on torch; never misses a key.

    A float32 pass over all keys keeps a few more than asked for, and those are scored in float64. Where its
    rounding error, bounded from above, could hide a nearer key, the row is scored against all keys in
    float64.

    Args:
        keys: (N, J) float64, key points.
        device: where the float32 pass runs.
    """

    def __init__(self, keys: Float[Tensor, "N J"], device: torch.device | str = "cpu") -> None:
        super().__init__(keys)
        lengths = (keys * keys).sum(1)
        self._columns = keys.T.to(device, torch.float32).contiguous()  # (J, N): one point is a fast product
        self._squares = lengths.to(device, torch.float32)
        self._longest = float(lengths.max().sqrt())

    def _search(self, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
        near = points.to(self._columns.device, torch.float32)
        # |k|² − 2 pᵀk; |p|² is the same for all keys of a row.
        scores = torch.addmm(self._squares, near, self._columns, alpha=-2)
        num_fetched = min(num + _SLACK, scores.shape[1])
        best, candidates = scores.topk(num_fetched, dim=1, largest=False)
        squared, keys = rescore(points, self.keys, candidates.cpu(), num)
        lengths = (points * points).sum(1)
        unseen = lengths + best[:, -1].cpu().double() - self._error(lengths.sqrt())
        uncertain = (squared[:, -1] >= unseen).nonzero()[:, 0]
        if num_fetched < scores.shape[1] and len(uncertain):
            squared[uncertain], keys[uncertain] = nearest(all_distances(points[uncertain], self.keys), num)
        return squared, keys

    def _error(self, lengths: Tensor) -> Tensor:
        """Upper bound of the float32 pass's rounding error for points of these lengths, (B,) float64.

        A sum of J products of float32 numbers is off by at most J·u·|p||k| (u half the machine epsilon); the
        conversions of p, k and |k|² and the last addition add a few u.
        """
        num_channels, longest = len(self._columns), self._longest
        unit = torch.finfo(torch.float32).eps / 2
        rounding = _product_rounding(self._columns.device)
        products = 2 * lengths * longest
        error: Tensor = (num_channels * unit + 4 * rounding) * products + 4 * unit * (longest**2 + products)
        return error


def _product_rounding(device: torch.device) -> float:
    """How coarsely torch rounds the factors of a float32 product at most, on a device and at present.

    Precision is set by ``torch.set_float32_matmul_precision`` or, of each backend, by ``fp32_precision``; the
    getter of the first refuses to answer where the second was used.
    """
    unit, tf32, bf16 = torch.finfo(torch.float32).eps / 2, 2.0**-11, 2.0**-8
    backend = getattr(torch.backends, "cuda" if device.type == "cuda" else "mkldnn")
    named = getattr(getattr(backend, "matmul", None), "fp32_precision", "none")
    rounding = {"none": unit, "ieee": unit, "tf32": tf32}.get(named, bf16)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        return rounding
    return max(rounding, {"highest": unit, "high": tf32}.get(older, bf16))


@final
class VectorIndex(KeyIndex):
    """Cells of neighbouring keys (FAISS inverted file), of which a search opens the nearest few.

    Misses a key now and then; the share it finds is measured in ``benchmarks/retrieval_cost.py``. Cells are
    found by k-means on at most 64 keys per cell with a fixed seed, so the same keys give the same index. They
    hold float16, which halves what a search reads from memory; the float64 scores put its rounding right.

    Args:
        keys: (N, J) float64, key points.
        num_probes: cells opened per point; None takes the measured default.

    Raises:
        ConfigError: FAISS is not installed.
    """

    def __init__(self, keys: Float[Tensor, "N J"], num_probes: int | None = None) -> None:
        super().__init__(keys)
        faiss = _faiss()
        num_keys, num_channels = keys.shape
        num_cells = max(1, min(round(2 * num_keys**0.5), num_keys // 39))  # FAISS wants 39 keys a cell
        quantizer = faiss.IndexFlatL2(num_channels)
        half = faiss.ScalarQuantizer.QT_fp16
        self._index = faiss.IndexIVFScalarQuantizer(
            quantizer, num_channels, num_cells, half, faiss.METRIC_L2, False
        )
        self._index.cp.seed = 0
        self._index.cp.max_points_per_centroid = 64
        self._index.cp.niter = 10  # more improves nothing that was measured
        self._index.nprobe = num_probes or max(16, num_cells // 32)
        # The nearest stay the nearest on any scale; on this one float16 cannot overflow.
        self._scale = 1 / max(float(keys.abs().max()), 1e-300)
        single = (keys * self._scale).to(torch.float32).numpy()
        self._index.train(single)
        self._index.add(single)

    def _search(self, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
        single = (points * self._scale).to(torch.float32).numpy()
        candidates = torch.from_numpy(self._index.search(single, min(num + _SLACK, len(self.keys)))[1]).long()
        short = (candidates[:, num - 1] < 0).nonzero()[:, 0]  # the opened cells held fewer keys
        squared, keys = rescore(points, self.keys, candidates, num)
        if len(short):
            squared[short], keys[short] = nearest(all_distances(points[short], self.keys), num)
        return squared, keys


def build_index(
    keys: Float[Tensor, "N J"], config: RetrievalConfig, device: torch.device | str = "cpu"
) -> KeyIndex:
    """The engine that fits the number of keys, or the one that is asked for.

    ``auto`` takes the vector index from :data:`NUM_KEYS_FOR_VECTOR` keys on where FAISS is installed.

    Args:
        keys: (N, J) float64, key points.
        config: its ``index`` is the choice.
        device: where the exact engine computes.

    Raises:
        ConfigError: the vector index is asked for and FAISS is not installed.
    """
    is_large = len(keys) >= NUM_KEYS_FOR_VECTOR and importlib.util.find_spec("faiss") is not None
    if config.index == "vector" or (config.index == "auto" and is_large):
        return VectorIndex(keys)
    return ExactIndex(keys, device)


def all_distances(points: Float[Tensor, "B J"], keys: Float[Tensor, "N J"]) -> Float[Tensor, "B N"]:
    """Squared distances of every point to every key in float64, each as if it were the only one.

    Args:
        points: (B, J) float64.
        keys: (N, J) float64.
    """
    distances = points.new_empty(len(points), len(keys))
    num_chunk = max(1, _CHUNK // max(1, keys.shape[1]))
    for row, point in enumerate(points):
        for start in range(0, len(keys), num_chunk):
            chunk = slice(start, start + num_chunk)
            torch.sum((keys[chunk] - point).square_(), 1, out=distances[row, chunk])
    return distances


def rescore(
    points: Float[Tensor, "B J"], keys: Float[Tensor, "N J"], candidates: Int[Tensor, "B M"], num: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """The ``num`` nearest of each row's own candidates, in float64; a candidate of −1 is none."""
    candidates = candidates.sort(1)[0]  # by number, so that the stable sort below breaks ties by number
    distances = torch.empty(candidates.shape, dtype=torch.float64)
    for row, point in enumerate(points):
        own = keys.index_select(0, candidates[row].clamp_min(0))
        torch.sum(own.sub_(point).square_(), 1, out=distances[row])
    squared, places = nearest(distances.masked_fill_(candidates < 0, torch.inf), num)
    return squared, candidates.gather(1, places)


def nearest(distances: Float[Tensor, "B N"], num: int) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """The ``num`` smallest distances of each row and their places, of equal ones the first place first."""
    squared, places = distances.sort(dim=1, stable=True)
    return squared[:, :num].contiguous(), places[:, :num].contiguous()


def _faiss() -> ModuleType:
    """The FAISS package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "index 'vector' needs FAISS: pip install 'scalable-lm[index]', or set retrieval.index to 'exact'"
        ) from error
    module: ModuleType = faiss
    return module
