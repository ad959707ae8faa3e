import pytest

from cnn.group_texts import group_text, member_row, points_table

LR, BATCH = "optimizer.learning_rate", "batch_size"


def spread(mean, std, count):
    radius = None if std is None else 1.5 * std
    return {
        "count": count, "mean": mean, "std": std,
        "interval": None if radius is None else [mean - radius, mean + radius],
    }  # fmt: skip


def point(mean, std=None, count=5, diverged=0, tta=None, **settings):
    statistics = {} if mean is None else {"test_accuracy": spread(mean, std, count)}
    if tta is not None:
        statistics["tta_test_accuracy"] = spread(tta, std, count)
    return {"settings": settings, "num_diverged": diverged, "statistics": statistics}


def member(seed, accuracy, **settings):
    name = {"name": f"seed={seed}", "seed": seed, "settings": settings}
    if accuracy is None:
        return {**name, "error": "step 3: the loss is not finite"}
    figures = {"test_accuracy": accuracy, "best_test_accuracy": accuracy + 0.001}
    return {**name, **figures, "train_loss": 1.23456, "wall_seconds": 75.4}


def group(members, points, *, is_sweep=True):
    result = {
        "members": [each for each in members if "error" not in each],
        "diverged": [each for each in members if "error" in each],
        "points": points,
        "wall_seconds": 3725.0,
    }
    if is_sweep:
        known = [each for each in points if each["statistics"]]
        best = max(known, key=lambda each: each["statistics"]["test_accuracy"]["mean"])
        result |= {"best": best, "num_points": len(points)}
    return result


SEEDS = [member(8, 0.6), member(9, 0.61), member(10, None)]
SWEPT = [
    member(seed, 0.6 if rate < 0.1 else None, **{LR: rate, BATCH: 64})
    for rate in (0.0003, 0.1)
    for seed in (0, 1)
]


def rows(members, width):
    texts = [member_row(m, members, is_best=m is members[0], width=width) for m in members]
    assert len({header for header, _ in texts}) == 1
    return [texts[0][0], *(row for _, row in texts)]


def test_a_row_for_each_seed():
    assert rows(SEEDS, 79) == [
        "seed  train loss  best accuracy  test accuracy      time",
        "   8      1.2346        60.10 %        60.00 %*     1:15",
        "   9      1.2346        61.10 %        61.00 %      1:15",
        "  10                                  diverged",
    ]
    assert rows(SEEDS, 39) == [
        "seed      best  accuracy      time",
        "   8   60.10 %   60.00 %*     1:15",
        "   9   61.10 %   61.00 %      1:15",
        "  10            diverged",
    ]


def test_a_row_for_each_member_of_a_sweep():
    assert rows(SWEPT, 79)[:2] + rows(SWEPT, 79)[-1:] == [
        "learning_rate  batch_size  seed  train loss      best  accuracy      time",
        "       0.0003          64     0      1.2346   60.10 %   60.00 %*     1:15",
        "          0.1          64     1                        diverged",
    ]
    assert rows(SWEPT, 39)[:2] == [
        "..ing_rate  batch_size  seed  accuracy",
        "    0.0003          64     0   60.00 %*",
    ]


POINTS = [
    point(0.6, 0.0032, **{LR: 0.0003}),
    point(0.634, 0.0032, tta=0.65, **{LR: 0.001}),
    point(0.633, 0.002, 4, 1, **{LR: 0.003}),
    point(None, diverged=5, **{LR: 0.1}),
]
SWEEP = group(SWEPT, POINTS)


def test_the_table_of_points():
    assert points_table(SWEEP, 79).split("\n") == [
        "learning_rate   seeds   test accuracy      95 % interval",
        "       0.0003       5  60.00 ± 0.32 %   59.52 to 60.48 %",
        "        0.001       5  63.40 ± 0.32 %*  62.92 to 63.88 %",
        "        0.003  4 of 5  63.30 ± 0.20 %   63.00 to 63.60 %",
        "          0.1  0 of 5        diverged",
    ]
    assert points_table(SWEEP, 39).split("\n")[::2] == [
        "learning_rate   seeds        accuracy",
        "        0.001       5  63.40 ± 0.32 %*",
        "          0.1  0 of 5        diverged",
    ]


def test_the_table_of_one_seed_each():
    points = [point(0.5 + 0.1 * len(f), count=1, **{"model.features": f}) for f in ([16, 32], [8])]
    assert points_table(group([], points), 79).split("\n") == [
        "features  seeds  test accuracy",
        "(16, 32)      1        70.00 %*",
        "    (8,)      1        60.00 %",
    ]


@pytest.mark.parametrize("width", range(39, 80))
def test_no_line_is_wider_than_the_screen(width):
    long = {LR: 0.00012345, "model.features": [16, 32, 64, 128, 256], "model.name": "resnet18"}
    settings = [long, {**long, LR: 3e-05}, {**long, "loss.name": "x" * 50, "augment.name": "y"}]
    for some in (settings[:2], [{**long, **settings[2]}] * 2):
        members = [member(seed, 1.0, **each) for seed, each in enumerate(some)]
        points = [point(1.0, 0.5, **each) for each in some]
        lines = [*rows(members, width), *points_table(group(members, points), width).split("\n")]
        assert max(map(len, lines)) <= width
        assert ["%" in line for line in lines[:3]] == [False, True, True]


def test_the_figures_of_seeds():
    seeds = group(SEEDS, [point(0.634, 0.0032, 2, 1, tta=0.65)], is_sweep=False)
    assert group_text(seeds).split("\n") == [
        "test accuracy 63.40 % ± 0.32 % (std of 2 seeds)",
        "  95 % interval of the mean: 62.92 to 63.88 % (Student's t)",
        "  with test-time augmentation: 65.00 % ± 0.32 %",
        "  lowest 60.00 %, highest 61.00 %",
        "  diverged: 1 of 3 members (result.json says why)",
        "  time: 1:02:05",
    ]


def test_the_figures_of_one_seed_and_of_none():
    one = group(SEEDS[:1], [point(0.6, count=1)], is_sweep=False)
    assert group_text(one).split("\n")[:-1] == [
        "test accuracy 60.00 %",
        "  one seed says nothing of the spread over seeds; more: --config.num_seeds=5",
    ]
    left = group(SEEDS[1:], [point(0.6, count=1, diverged=1)], is_sweep=False)
    assert group_text(left).split("\n")[1] == "  one seed says nothing of the spread over seeds"
    none = group(SEEDS[2:], [point(None, diverged=1)], is_sweep=False)
    assert group_text(none).split("\n")[:-1] == [
        "no member has a test accuracy",
        "  diverged: 1 of 1 members (result.json says why)",
    ]


def test_the_figures_of_a_sweep():
    assert group_text(SWEEP).split("\n") == [
        "best of 4 settings: optimizer.learning_rate=0.001",
        "  test accuracy 63.40 % ± 0.32 % (std of 5 seeds)",
        "  95 % interval of the mean: 62.92 to 63.88 % (Student's t)",
        "  with test-time augmentation: 65.00 % ± 0.32 %",
        "  the highest of 3 results is partly luck: expect less of new seeds and images",
        "  second best: optimizer.learning_rate=0.003, 63.30 %",
        "  the intervals of the two overlap, so their order is uncertain",
        "  diverged: 2 of 4 members (result.json says why)",
        "  time: 1:02:05",
    ]


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (POINTS[:2], "the intervals of the two do not overlap"),
        ([point(0.6, count=1, **{LR: r}) for r in (1, 2)],
         "their order is uncertain, as one seed has no spread"),
    ],
)  # fmt: skip
def test_whether_the_best_is_the_best(points, text):
    assert group_text(group(SWEPT, points)).split("\n")[-3] == f"  {text}"


def test_the_best_of_one_has_no_rival():
    assert "second best" not in group_text(group(SWEPT, POINTS[1:2] + POINTS[3:]))
