"""Networks defined by this project. Names and equation numbers are those of the papers."""
