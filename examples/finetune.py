r"""Fine-tunes pretrained weights with several optimizers and methods side by side.

python examples/finetune.py                       # MiniLM on tweets
python examples/finetune.py --method lora,qlora,qst --steps 500
python examples/finetune.py --job language        # SmolLM2-135M on questions of arithmetic
python examples/finetune.py --help
"""

import sys
from pathlib import Path

# A script sees its own directory only; what it shares with pre-training is beside that.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.finetuning.comparison import compare
from examples.finetuning.config import from_flags
from examples.llama.config import PretrainError
from examples.llama.progress import make_console


def main() -> int:
    """Runs the comparison that the command line describes.

    Returns:
        The exit status: 2 after a mistake in the settings, 130 after Ctrl-C, as shells do.
    """
    try:
        return 0 if compare(from_flags(), make_console()) else 130
    except (PretrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training began: there is nothing to save
        return 130


if __name__ == "__main__":
    sys.exit(main())
