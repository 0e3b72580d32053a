"""Comparisons: methods × seeds on equal budgets. spec: what is compared; plan: its runs; launch: starts them; record: one JSON
per run; statistics: gains, intervals and curves; results, page: what is written of them."""
