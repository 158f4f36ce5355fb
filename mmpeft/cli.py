"""The command line: parse, call one function, print."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import cyclopts

import mmpeft
from mmpeft.errors import MmpeftError

# Short forms of settings that are said often.
SHORT_FORMS = {
    "--base": "--base.name",
    "--base_config": "--base.config",
    "--base-config": "--base.config",
    "--attention": "--base.attention",
    "--precision": "--base.precision",
    "--processes": "--train.processes",
    "--steps": "--train.steps",
    "--trigger": "--data.trigger",
    "--caption": "--data.caption",
}
# Commands whose flags are the recipe's settings, so that the settings of the chosen plugins are among them.
RECIPE_COMMANDS = ("train", "plan")
# Where a command's function is, if not in mmpeft.commands under its own name.
FUNCTIONS = {
    "train": "mmpeft.commands:_train",
    "plan": "mmpeft.commands:_plan",
    "compose": "mmpeft.composition.commands:_compose",
    "interference": "mmpeft.composition.commands:interference",
    "compare": "mmpeft.composition.commands:compare",
    "plugins": "mmpeft.commands:plugins_command",
}


def main() -> None:
    """Run the command line; errors that are ours are one line and exit with 2."""
    from mmpeft.trainers import launch

    launch.prepare_threads()
    quieten_libraries(os.environ)
    try:
        try:
            make_app(sys.argv[1:])(expanded(sys.argv[1:]), exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except MmpeftError as error:
        code = _complaint(str(error))
    except cyclopts.CycloptsError as error:
        code = _complaint(parse_error_sentence(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if "RANK" in os.environ:
        launch.leave(code)
    sys.exit(code)


def make_app(tokens: Sequence[str] = ()) -> cyclopts.App:
    """Build the application; `train`, `plan` and `compose` have the flags of the plugins that the tokens choose."""
    app = cyclopts.App(
        name="mmpeft",
        version=mmpeft.__version__,
        help="Train small adapters on big frozen models, and compose them exactly.",
        # Markdown in help would load a parser that takes a third of the start.
        help_format="plaintext",
        # Lists are given or left out; no second flag empties them.
        default_parameter=cyclopts.Parameter(negative_iterable=()),
    )
    if tokens[:1] and tokens[0] in RECIPE_COMMANDS:
        from mmpeft import commands

        shorts = ", ".join(f"{short} ({full})" for short, full in SHORT_FORMS.items() if "_" not in short)
        app.command(
            commands.recipe_command(tokens[0], expanded(tokens)),
            name=tokens[0],
            help_epilogue=f"Short forms: {shorts}.",
        )
    elif tokens[:1] == ["compose"]:
        from mmpeft.composition.commands import compose_command

        app.command(compose_command(tokens), name="compose")
    for name, summary in (
        ("train", "Train an adapter from a folder of images or a recipe."),
        ("plan", "Look at data and cost before training: nothing is trained."),
        ("generate", "Draw pictures with adapters mixed at given weights."),
        ("bake", "Write a base with adapters fused into its weights."),
        ("compose", "Compose adapters into a new adapter."),
        ("interference", "Measure what adapters would do to each other."),
        ("compare", "Say how far apart two adapters are."),
        ("convert", "Write an adapter the way another tool reads it."),
        ("inspect", "Say what is in an adapter."),
        ("doctor", "Say what works on this machine, and how to get the rest."),
        ("plugins", "List methods, backbones, objectives, datasets and strategies."),
        ("quickstart", "Train, mix, fuse and measure two adapters on the embedded base."),
    ):
        if not (name in (*RECIPE_COMMANDS, "compose") and list(tokens[:1]) == [name]):
            app.command(FUNCTIONS.get(name, f"mmpeft.commands:{name}"), name=name, help=summary)
    return app


def expanded(tokens: Sequence[str]) -> list[str]:
    """Write the short forms of settings out, when the command takes a recipe's settings."""
    if not tokens or tokens[0] not in RECIPE_COMMANDS:
        return list(tokens)
    return [
        "=".join((SHORT_FORMS.get(flag, flag), *rest))
        for flag, *rest in (token.split("=", 1) for token in tokens)
    ]


def quieten_libraries(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Let the libraries below say errors only, and our own warnings be one line each.

    What a user has set with TRANSFORMERS_VERBOSITY and its kin, or python -W, stays.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        environment.setdefault(name, "error")
    # PEFT imports it where it is installed, and it then misses an optional package aloud.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="mmpeft")
        warnings.showwarning = lambda message, *where: print(f"mmpeft: {message}", file=sys.stderr)


def parse_error_sentence(error: cyclopts.CycloptsError) -> str:
    """Word what could not be parsed in one sentence."""
    from pydantic import ValidationError

    from mmpeft.config import Recipe, error_sentence

    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        return error_sentence(Recipe, cause)
    return " ".join(str(error).split())


def _complaint(sentence: str) -> int:
    rank = os.environ.get("RANK")
    print(f"mmpeft{f' (process {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
