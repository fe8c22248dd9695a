"""Floor 3: SAT inside of other libraries."""
