"""The commands.

Here        the application, `bench`, and the exit status.
Elsewhere   the other commands, by area (train.py, use.py, serving.py, inside.py, teach.py), one thin function each; how
            results look on a terminal (show.py).
Promise     0 it worked; 2 the user can mend it, said in one line on stderr; 3 a rank was lost, and --resume goes on;
            anything else is our bug, with its traceback. `--help` loads no tensor library.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dougong.cli import inside, serving, teach, train, use
from dougong.cli.options import Json
from dougong.core.errors import ConfigError, DougongError, RankError

app = typer.Typer(
    name="dougong",
    help="From records of several modalities to a trained, explained and usable model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Heavy parts are imported inside commands, so that --help and a typing mistake answer at once.
for area in (train, use, serving, inside, teach):
    area.add_commands(app)

# What typer raises at a typing mistake. It brings click as a part of its own or as another package, by version.
ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


@app.command()
def bench(
    name: Annotated[str | None, Argument(help="A benchmark; without one, all of them.")] = None,
    listed: Annotated[bool, Option("--list", help="Name them and what they measure.")] = False,
    quick: Annotated[bool, Option("--quick", help="Fewer repetitions; not to be quoted.")] = False,
    check_figures: Annotated[bool, Option("--check", help="Exit 1 if a figure falls short.")] = False,
    as_json: Json = False,
) -> int:
    """Measure the claims: each script's figures beside what was asked of them."""
    from dougong.cli.bench import about, print_measured, run_script, scripts

    known = scripts()
    if listed:
        lines = {key: about(path) for key, path in known.items()}
        print(json.dumps(lines) if as_json else "\n".join(f"{key:16} {line}" for key, line in lines.items()))
        return 0
    if name is not None and name not in known:
        raise ConfigError(f"{name!r} is no benchmark. Use one of {', '.join(known)}.")
    chosen = {key: path for key, path in known.items() if name in (None, key)}
    found = {key: run_script(path, quick=quick) for key, path in chosen.items()}
    measured = {key: figures for key, figures in found.items() if figures is not None}
    if as_json:
        print(json.dumps({key: [figure.model_dump() for figure in figures] for key, figures in measured.items()}))
    else:
        print_measured(measured, quick=quick)
    if len(measured) < len(found):
        left_out = ", ".join(key for key in found if key not in measured)
        print(f"dougong: not measured, for what it said above: {left_out}.", file=sys.stderr)
        return 2
    short = any(figure.holds is False for figures in measured.values() for figure in figures)
    return 1 if check_figures and short else 0


def main(arguments: list[str] | None = None) -> int:
    """Exit 0 if it worked, 2 if the user can mend it, 3 if another rank was lost. Anything else is our bug, with its
    traceback."""
    try:
        status: Any = app(args=arguments, prog_name="dougong", standalone_mode=False)
    except DougongError as error:
        lost = isinstance(error, RankError)
        if lost and "DOUGONG_LAUNCHER" in os.environ:
            return 3  # the launcher knows more of it, and says it once for all
        rank = os.environ.get("RANK", "0")  # of torchrun's processes, the first speaks for all that need no other name
        print(f"dougong{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 3 if lost else 2
    except ClickError as error:
        # Without a message, the help was printed already: nothing was asked for.
        if message := error.format_message():
            command = error.ctx.command_path if getattr(error, "ctx", None) else "dougong"
            said = message if message.endswith((".", "?")) else f"{message}."
            print(f"dougong: {said} See {command} --help.", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("dougong: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return status if isinstance(status, int) else 0
