"""What several seeds in one program cost, beside as many processes."""
