"""The commands of `python -m cnn`: each is the module of its name.

It has two functions: `add_arguments(parser)` adds the command's flags, and `run(arguments)` does
the work and returns the exit code, or None for 0. With `TAKES_CONFIG = True` a command takes a
CONFIG and `--config.FIELD=VALUE` flags as well, and finds the `cnn.command_line.ChosenConfig` in
`arguments.chosen`; `cnn.commands.prepare` makes an experiment of it. The module's docstring is the
command's help. A new command is a file here and a row in `COMMANDS`.
"""

# By the name that a person types; a module has an underscore for a hyphen.
COMMANDS: dict[str, str] = {
    "evaluate": "score a run: accuracy, classes, calibration, mistakes",
    "predict": "classify image files with a run",
    "export": "write a run as StableHLO, ONNX and safetensors, with a model card",
    "report": "an HTML page about one run, or a comparison of several",
    "compare": "two configs over seeds and image by image, and the seeds that would tell",
    "summary": "layers, memory and time of a config, without training",
    "data": "list, prepare and show datasets",
    "lr-find": "suggest a learning rate for a config",
}
