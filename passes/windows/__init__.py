"""Window attention: the windows, their operators, and the forms that operators are lowered to."""
