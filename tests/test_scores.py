import numpy as np
import pytest
import sklearn.metrics

from cnn.scores import (
    calibration,
    class_scores,
    confusion_matrix,
    most_confident_mistakes,
    top_k_accuracy,
)


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400).astype(np.int32)
    labels[labels == 3] = 2  # a class without images
    logits = rng.normal(size=(400, 5)).astype(np.float32)
    logits[np.arange(400), labels] += 1
    logits[:, 4] -= 100  # a class that is never predicted
    return logits, labels


def test_scores_are_those_of_scikit_learn(answers):
    logits, labels = answers
    predictions = logits.argmax(-1)
    confusion = confusion_matrix(labels, predictions, 5)
    names = list(range(5))
    np.testing.assert_array_equal(
        confusion, sklearn.metrics.confusion_matrix(labels, predictions, labels=names)
    )
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=names, zero_division=0
    )
    scores = class_scores(confusion)
    np.testing.assert_allclose(scores["precision"], precision)
    np.testing.assert_allclose(scores["recall"], recall)
    np.testing.assert_allclose(scores["f1"], f1)
    assert top_k_accuracy(logits, labels, 5) == 1
    for k in (1, 2, 4):
        expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=names)
        assert top_k_accuracy(logits, labels, k) == expected


def test_calibration_by_hand():
    confidence = np.array([0.2, 0.95, 0.91, 0.95, 1.0])
    correct = np.array([True, True, True, False, False])
    found = calibration(confidence, correct, num_bins=10)
    assert found.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert found.accuracy[[1, 9]].tolist() == [1.0, 0.5]
    assert found.confidence[9] == pytest.approx(0.9525)
    assert np.isnan(found.accuracy[0])
    assert found.error == pytest.approx((1 * 0.8 + 4 * 0.4525) / 5)


def test_bins_hold_their_upper_edge():
    assert calibration(np.array([0.0, 0.5, 1.0]), np.ones(3, bool), 2).counts.tolist() == [2, 1]


def test_mistakes_come_by_confidence():
    confidence = np.array([0.9, 0.5, 0.7, 0.8])
    correct = np.array([True, False, False, False])
    assert most_confident_mistakes(confidence, correct, 2).tolist() == [3, 2]
    assert most_confident_mistakes(confidence, np.ones(4, bool), 2).tolist() == []
