"""Writers of fixtures/, one module per subject."""
