"""Benchmarks of a clone of this repository; they are not installed with the package.

Run from the root of the clone; each takes `--help` and writes into the `results` folder beside it:

    python -m benchmarks.peers                  training and inference beside other frameworks
    python -m benchmarks.whole_runs             whole processes, beside a Keras script
    python -m benchmarks.startup                the first seconds of a run, by part
    python -m benchmarks.speedrun               seeds of a speed recipe, beside its original script
    python -m benchmarks.accelerator            such a recipe on GPUs and TPUs, and where time goes
    python -m benchmarks.accuracy_by_cost       a picture of what these have kept: docs/speed.png
    python -m benchmarks.pictures.predict       a folder of photographs, beside Keras and timm
    python -m benchmarks.pictures.folder        own pictures: prepared, trained on, classified
    python -m benchmarks.scaling                cost by batch, width, depth, pixels, devices, data
    python -m benchmarks.reliability.kills      runs that are killed end in the same bits
    python -m benchmarks.reliability.cost       what checkpoints, digests and guards cost
"""
