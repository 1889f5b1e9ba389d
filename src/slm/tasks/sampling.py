"""Drawing without luck: who is drawn depends on the seed and the text alone, never on file order.

Every text gets a rank, the SHA-256 of seed and text, and the lowest ranks are drawn. So a draw is the
same on every machine and Python version, and a larger draw contains the smaller one of its stratum.
"""

import hashlib
from collections.abc import Mapping


def fold(text: str) -> str:
    """Return `text` without differences of case and white space: the form in which texts are compared."""
    return " ".join(text.casefold().split())


def rank(seed: int, text: str) -> bytes:
    """Return the SHA-256 of seed and text, by which texts are put in an order that only looks random."""
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def share_proportionally(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share `total` draws over strata in proportion to their sizes, one each as far as they go.

    Args:
        total: draws to share; more than there are gives every stratum its size.
        sizes: size of each stratum.

    Returns:
        Draws of each stratum, at most its size; they sum to min(total, Σ sizes).
    """
    shares = dict.fromkeys(sizes, 0)
    largest_first = sorted((label for label in sizes if sizes[label] > 0), key=lambda y: (-sizes[y], y))
    for label in largest_first[: max(total, 0)]:
        shares[label] = 1
    available = sum(sizes[label] - 1 for label in largest_first)
    rest = min(total - len(largest_first), available)
    if rest <= 0:
        return shares
    remainders = {}
    for label in largest_first:
        whole, remainders[label] = divmod(rest * (sizes[label] - 1), available)
        shares[label] += whole
    missing = rest + len(largest_first) - sum(shares.values())
    for label in sorted(largest_first, key=lambda y: (-remainders[y], y))[:missing]:
        shares[label] += 1
    return shares


def share_evenly(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share `total` draws over strata as equally as their sizes allow.

    Args:
        total: draws to share; more than there are gives every stratum its size.
        sizes: size of each stratum.

    Returns:
        Draws of each stratum, at most its size; they sum to min(total, Σ sizes).
    """
    shares: dict[str, int] = {}
    left = max(total, 0)
    smallest_first = sorted(sizes, key=lambda y: (sizes[y], y))
    for position, label in enumerate(smallest_first):
        shares[label] = min(sizes[label], left // (len(smallest_first) - position))
        left -= shares[label]
    return shares
