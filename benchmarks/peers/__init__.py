"""What the budgets are compared with, as a competent engineer uses it."""
