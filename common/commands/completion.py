"""`completion SHELL`: what a shell needs to complete commands and options."""

import argparse

from common.context import Context

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'bash, zsh: eval "$(twintune completion bash)"; fish: twintune completion fish | source'
    parser.add_argument("shell", choices=SHELLS, help="shell to print it for")


def run(args: argparse.Namespace, context: Context) -> None:
    import argcomplete

    print(argcomplete.shellcode(["twintune"], shell=args.shell))
