"""Window attention: its forms, its operators, and what they are lowered to."""
