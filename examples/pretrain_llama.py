"""Pre-trains a small Llama with several optimizers side by side.

python examples/pretrain_llama.py                 # AdamW and MicroAdam, about five minutes
python examples/pretrain_llama.py --preset 60m --optimizer microadam --text corpus.txt
python examples/pretrain_llama.py --help
"""

import sys

from llama.comparison import compare
from llama.config import PretrainError, from_flags
from rich.console import Console


def main() -> int:
    """Runs the comparison that the command line describes.

    Returns:
        The exit status: 2 after a mistake in the settings, 130 after Ctrl-C, as shells do.
    """
    try:
        return 0 if compare(from_flags(), Console(highlight=False)) else 130
    except (PretrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training began: there is nothing to save
        return 130


if __name__ == "__main__":
    sys.exit(main())
