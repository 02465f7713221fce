"""How the embedded model is made: its world of pictures, the recipe that trains it, the judge that looks at it."""
