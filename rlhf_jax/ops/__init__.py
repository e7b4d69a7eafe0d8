"""Arrays in, arrays out: the arithmetic that every objective shares."""
