"""Write the graphs of a bundle as AOTInductor packages."""
