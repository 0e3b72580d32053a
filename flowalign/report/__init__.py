"""What people look at after a run: charts, image grids, the picture of a tree, the HTML page and the summary."""
