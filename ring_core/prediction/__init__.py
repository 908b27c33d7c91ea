"""How long a plan would take, from rates that were measured."""
