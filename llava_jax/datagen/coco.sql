-- The records of COCO's files, while they are joined to contexts.
DROP TABLE IF EXISTS temp.image;
DROP TABLE IF EXISTS temp.caption;
DROP TABLE IF EXISTS temp.box;
CREATE TEMP TABLE image (number INTEGER PRIMARY KEY, id INTEGER NOT NULL UNIQUE, name, width, height);
CREATE TEMP TABLE caption (image INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TEMP TABLE box (image INTEGER NOT NULL, category, x, y, width, height);
