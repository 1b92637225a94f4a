"""The command `indiclip`, and its alias `lightning fit|validate|test|predict --config ...`.

Only this file knows model and data together: it links them, compares them before training, and turns a user's mistake
into one line. Nothing heavy is imported until a command needs it.
"""

import faulthandler
import os
import select
import sys
from pathlib import Path

from indiclip.quiet import quiet_torchao

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_COMMANDS = ("check", "plan", "shards", "tokenizer", "embed", "bench", "leaderboard", "soup", "export")

_OF_RUN = "--config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt"
_EXAMPLES = {"fit": "--config conf/quickstart.yaml --trainer.max_steps 100", "predict": f"{_OF_RUN} --pictures 20"}

_HELP = """\
IndiCLIP {version}: trains vision encoders that understand India and the world.

usage: indiclip <command> [--config FILE]... [options]

  fit        train             indiclip fit --config conf/quickstart.yaml
  validate   score held-out    indiclip validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt
  test       the same, once more on `data.val`
  predict    write what the heads find in `data.val` to RUN/predictions/
  check      read what a config would train on        indiclip check --config conf/real_small.yaml
  plan       what a config costs on a cluster         indiclip plan --config conf/shards.yaml --gpu h100 --nodes 16
  shards     index, check, pack and count data        indiclip shards --help
  tokenizer  tokens per word in every language        indiclip tokenizer --help
  embed      any data to embeddings and their keys    indiclip embed --help
  bench      score an encoder on India's benchmark    indiclip bench --help
  leaderboard  runs of the benchmark as a site        indiclip leaderboard --help
  soup       average the weights of several runs      indiclip soup --help
  export     write an encoder for another library     indiclip export --help

  --config FILE            an experiment, a file or a shipped one (quickstart); several are stacked, later ones win
  --name NAME              the run's folder, runs/NAME (default: the first config's name)
  --ckpt_path FILE         go on from a checkpoint; `last`: from the newest whole one of --name, or from the beginning
  --trainer.max_steps N    any key of the YAML can be set so; lists append with `+:` in a second --config
  --print_config           print the whole configuration and stop
  --help, --version        `indiclip fit --help`: the options one needs; `--help=all`: every one

INDICLIP_DATA is the folder of local data (default: data); INDICLIP_TRACEBACK=1 shows where an error came from.

A config names Python classes and so can run any code: use only configs you trust.
The same works as `lightning fit --config ...`.
"""

_COMMAND_HELP = """\
usage: indiclip {command} --config FILE [--config FILE]... [options]

example: indiclip {command} {example}

  --config FILE                   an experiment, a file or a shipped one (quickstart, evals/india); several are
                                  stacked, later ones win, lists are replaced, or grow with `+:`
  --name NAME, --runs FOLDER      the run's folder is FOLDER/NAME (default: runs/<the first config's name>)
  --ckpt_path FILE                go on from, or score, a checkpoint; of RUN/config.yaml all but `fit` take its last one
  --ckpt_path last                the newest whole checkpoint of --name; `fit` starts from the beginning without one
  --seed_everything N             order of the samples, augmentation, initial weights
  --pictures N                    predict: pictures of so many images beside the predictions, for each head
  --override true                 go on with other data, seed or heads than the checkpoint's run
  --model.lr X  --model.warmup_steps N  --model.weight_decay X  --model.task_weights indiclip.task_weights.Uncertainty
  --model.optimizer timm.optim.Lion  --model.lr_schedule indiclip.optim.Linear
  --data.num_workers N            loader processes
  --data.steps_per_epoch N        steps between validations
  --trainer.max_steps N           length of the run
  --trainer.accelerator gpu  --trainer.devices 8  --trainer.num_nodes 4  --trainer.precision bf16-mixed
  --model.micro_batches N         parts of a batch that memory does not hold
  --trainer.gradient_clip_val X  --trainer.limit_val_batches N
  --print_config                  print the whole configuration and stop

`indiclip {command} --help=all` lists every option (it imports the libraries first: about ten seconds).
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `indiclip`. Returns the exit status; 0 where what reads its output has seen enough (`| head`)."""
    quiet_torchao()
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # where C++ aborts the process, its stacks are all that there is to see
    if sys.stdout is None:  # closed by `>&-`; what is opened next must not get its number, where libraries write
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            raise  # another pipe is broken
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
        return 0


def _run(argv: list[str]) -> int:
    from indiclip import __version__

    word = argv[0] if argv else "help"
    if word in ("-h", "--help", "help"):
        print(_HELP.format(version=__version__))
        return 0
    if word in ("-V", "--version", "version"):
        print(f"indiclip {__version__}")
        return 0
    from indiclip.commands.words import importing, run_command

    if word in _COMMANDS:
        return run_command(argv)
    if word not in _TRAINER_COMMANDS:
        from indiclip.names import did_you_mean

        hint = did_you_mean(word, (*_TRAINER_COMMANDS, *_COMMANDS))
        print(f"indiclip: no command {word!r}{hint} (indiclip --help)", file=sys.stderr)
        return 2
    if any(flag in argv for flag in ("-h", "--help")):
        print(_COMMAND_HELP.format(command=word, example=_EXAMPLES.get(word, _OF_RUN)))
        return 0
    with importing():
        from indiclip.training.cli import run

    return run(["--help" if flag == "--help=all" else flag for flag in argv])


def lightning() -> int:
    """Entry point of `lightning`: our commands here, every other word to lightning-sdk where that is installed."""
    argv = sys.argv[1:]
    if argv and argv[0] in _TRAINER_COMMANDS:
        return main(argv)
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        scripts = distribution("lightning-sdk").entry_points.select(group="console_scripts", name="lightning")
    except PackageNotFoundError:
        wanted = f"`lightning {argv[0]}`" if argv else "`lightning`"
        print(
            f"{wanted} belongs to the package lightning-sdk, which is not installed; "
            f"IndiCLIP answers to `lightning {'|'.join(_TRAINER_COMMANDS)}`",
            file=sys.stderr,
        )
        return 2
    return int(next(iter(scripts)).load()() or 0)


if __name__ == "__main__":
    sys.exit(main())
