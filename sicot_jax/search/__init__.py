"""What happens to a query photo: category, ranking, open-set rejection."""
