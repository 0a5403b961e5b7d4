r"""Pre-trains a small Llama with several optimizers side by side.

python examples/pretrain_llama.py                 # AdamW and MicroAdam, about five minutes
python examples/pretrain_llama.py --preset 60m --optimizer microadam --text corpus.txt
python examples/pretrain_llama.py --help

Twenty steps at the published size of 58 million parameters, four minutes on two CPU cores:

python examples/pretrain_llama.py --preset 60m --tokenizer bpe --vocab-size 32000 --seq-len 32 \
    --batch 4 --steps 20 --save-every 10 --eval-every 10 \
    --optimizer adamw,microadam,adam_mini4bit,adamw8bit

On many hosts, the same command on each; --mesh names all of their devices together:

python examples/pretrain_llama.py --mesh fsdp=32 --coordinator auto
python examples/pretrain_llama.py --mesh data=2 --coordinator HOST:PORT --processes 2 --process-id 0
"""

import sys

from llama.comparison import compare
from llama.config import PretrainError, from_flags, unchecked
from llama.processes import join, together
from llama.progress import make_console


def main() -> int:
    """Runs the comparison that the command line describes.

    Returns:
        The exit status: 2 after a mistake in the settings, 130 after Ctrl-C, as shells do.
    """
    try:
        # Before anything that may fail in one process only, such as reading the run to resume.
        given = unchecked()
        console = make_console()
        if given.coordinator is not None:
            # Where one never comes, JAX ends the others with a stack trace and no cause.
            count = given.processes or "all"
            console.print(f"Waiting for {count} processes, five minutes at most ...")
        join(given)
        with together():
            config = from_flags()
        return 0 if compare(config, console) else 130
    except (PretrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training began: there is nothing to save
        return 130


if __name__ == "__main__":
    sys.exit(main())
