"""`python -m tsa_compile`."""

from tsa_compile.cli import main

main()
