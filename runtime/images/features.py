"""Image features of a batch's new tokens, handed out piece by piece.

Enters: each row's new tokens and features. Leaves: the features of each piece's image tokens, row by row. Invariant: a
row has as many features as image tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError

Features = Sequence[NDArray[np.float32]]
"""Each row's image features [M, H], one for each image token among its new tokens; empty where no row has any."""


class RowFeatures:
    """Features that remain for each row's next image tokens.

    Args:
        rows: Each row's new tokens.
        features: Each row's features.
        image_token: Id of the token that stands for a feature; None where the model takes no images.
        size: Values of a feature (H).

    Raises:
        SessionError: A row has not as many features as image tokens.
    """

    def __init__(self, rows: Sequence[Sequence[int]], features: Features, image_token: int | None, size: int) -> None:
        self.image_token = image_token
        self.left = list(features) or [np.empty((0, size), np.float32)] * len(rows)
        for row, (ids, features_MH) in enumerate(zip(rows, self.left, strict=True)):
            expected = self._count(np.asarray(ids)), size
            if features_MH.shape != expected:
                raise SessionError(
                    f"row {row} has {expected[0]} image tokens and came with features {list(features_MH.shape)}: "
                    f"give {list(expected)}"
                )

    def take(self, rows: slice, ids_BS: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """The features of a piece's image tokens, row by row; None where it has none. Pads are no image tokens."""
        taken = []
        for row, ids_S in zip(range(rows.start, rows.stop), ids_BS, strict=True):
            count = self._count(ids_S)
            taken.append(self.left[row][:count])
            self.left[row] = self.left[row][count:]
        return np.concatenate(taken) if any(map(len, taken)) else None

    def _count(self, ids: NDArray[np.int64]) -> int:
        return 0 if self.image_token is None else int(np.count_nonzero(ids == self.image_token))
