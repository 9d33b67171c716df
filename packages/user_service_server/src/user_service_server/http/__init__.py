"""What all routes share: bodies, answers, errors, conditions, request ids, documentation."""
