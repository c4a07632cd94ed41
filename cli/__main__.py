"""`python -m glp_lens_cli`, which `torchrun -m` needs."""

from . import app

app(prog_name="glp-lens")
