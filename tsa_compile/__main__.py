"""`python -m tsa_compile`."""

from tsa_compile.frontends.cli import main

main()
