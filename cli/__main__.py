"""`python -m glp_lens_cli`, which `torchrun -m` needs."""

from glp_lens_cli import app

app(prog_name="glp-lens")
