"""What the predictions of a model on labelled images say about it, as NumPy arrays on the host."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """How confidence and accuracy agree, in bins of equal width.

    Attributes:
      counts: `int[M]`, the images of each bin.
      confidence: `float[M]`, the mean confidence in each bin; NaN in an empty one.
      accuracy: `float[M]`, the fraction of correct predictions in each bin; NaN in an empty one.
      error: the expected calibration error, the mean over images of |accuracy - confidence| of
        their bin (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3).
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> Calibration:
    """Compares confidence and accuracy.

    Args:
      confidence: `float[N]`, the probability of the predicted class, 0 to 1.
      correct: `bool[N]`.
      num_bins: M; bin m holds confidences above m / M, up to and with (m + 1) / M.

    >>> calibration(np.array([0.9, 0.9]), np.array([True, False]), num_bins=10).error
    0.4
    """
    edge = np.ceil(confidence.astype(np.float64) * num_bins).astype(int) - 1
    index = np.clip(edge, 0, num_bins - 1)
    counts = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # an empty bin is NaN
        mean = np.bincount(index, confidence, num_bins) / counts
        accuracy = np.bincount(index, correct, num_bins) / counts
    error = np.nansum(counts * np.abs(accuracy - mean)) / len(confidence)
    return Calibration(counts, mean, accuracy, round(float(error), 12))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """`int[K, K]`: how many images of the class of the row were predicted as that of the column.

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, `float[K]` each; 0 where they are 0 / 0.

    Args:
      confusion: from `confusion_matrix`.

    >>> class_scores(np.array([[1, 1], [0, 1]]))["recall"].tolist()
    [0.5, 1.0]
    """
    right = np.diag(confusion).astype(float)
    predicted, actual = confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(actual, 1),
        # 2 P R / (P + R), without its 0 / 0
        "f1": 2 * right / np.maximum(predicted + actual, 1),
    }


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The fraction of images for which fewer than `k` logits exceed that of the label."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return float(((logits > own).sum(axis=1) < k).mean())


def most_confident_mistakes(confidence: np.ndarray, correct: np.ndarray, limit: int) -> np.ndarray:
    """The indices of the wrongly classified images, the most confident first: `int[<= limit]`."""
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
