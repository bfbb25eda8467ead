"""SFT checkpoint to RL/vLLM format: ``python reload_config.py SRC DST`` does what ``vilavt convert SRC DST`` does."""

import sys

try:
    import typer

    from vilavt_core.cli.checkpoint import convert
    from vilavt_core.errors import VilavtError
except ModuleNotFoundError as error:
    sys.exit(
        f"reload_config.py: no module {error.name!r} in {sys.executable}. Install the package first, from the root of "
        f"the checkout: {sys.executable} -m pip install ./vilavt_hf"
    )

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(convert)
    try:
        app()
    except VilavtError as error:
        sys.exit(f"reload_config.py: {error}")
