// ZIP files: written without compression, read with or without it.

const LIMITS = { entries: 10_000, bytes: 512 << 20 };
const [ENTRY, DIRECTORY, END] = [0x04034b50, 0x02014b50, 0x06054b50];
const CRCS = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = CRCS[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Numbers, each in so many bytes, little-endian: packed("2 4", 20, 7). */
function packed(sizes, ...numbers) {
  const bytes = sizes.split(" ").flatMap((size, n) => Array.from({ length: size }, (_, i) => numbers[n] / 2 ** (8 * i)));
  return Uint8Array.from(bytes, (byte) => byte & 255);
}

/** -> a ZIP file of what is in `files`: {name, blob}. */
export async function zip(files) {
  const [parts, directory] = [[], []];
  let [offset, length] = [0, 0];
  for (const { name, blob } of files) {
    const [bytes, path] = [new Uint8Array(await blob.arrayBuffer()), new TextEncoder().encode(name)];
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const common = packed("2 2 2 2 2 4 4 4 2 2", 20, 0x800, 0, 0, 0x21, crc32(bytes), bytes.length, bytes.length, path.length, 0);
    parts.push(packed("4", ENTRY), common, path, bytes);
    directory.push(packed("4 2", DIRECTORY, 20), common, packed("2 2 2 4 4", 0, 0, 0, 0, offset), path);
    offset += 30 + path.length + bytes.length;
    length += 46 + path.length;
  }
  const end = packed("4 2 2 2 2 4 4 2", END, 0, 0, files.length, files.length, length, offset, 0);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** -> Map of name to a function that reads the entry. Throws Error for what is no ZIP file, or too large a one. */
export async function unzip(file) {
  const tail = new DataView(await file.slice(-65_557).arrayBuffer()); // the end with its longest comment
  let end = tail.byteLength - 22;
  while (end >= 0 && tail.getUint32(end, true) !== END) end--;
  if (end < 0) throw new Error("is no complete ZIP file");
  const [count, length, start] = [tail.getUint16(end + 10, true), tail.getUint32(end + 12, true), tail.getUint32(end + 16, true)];
  if (count > LIMITS.entries) throw new Error(`has too many files in it: ${count}`);
  const view = new DataView(await file.slice(start, start + length).arrayBuffer());
  const entries = new Map();
  for (let i = 0, at = 0, total = 0; i < count; i++) {
    if (at + 46 > view.byteLength || view.getUint32(at, true) !== DIRECTORY) throw new Error("has a damaged directory");
    const [flags, method, path, extra, comment] = [8, 10, 28, 30, 32].map((field) => view.getUint16(at + field, true));
    const [crc, stored, bytes, offset] = [16, 20, 24, 42].map((field) => view.getUint32(at + field, true));
    if (at + 46 + path > view.byteLength) throw new Error("has a damaged directory");
    if ((total += bytes) > LIMITS.bytes) throw new Error(`has more than ${LIMITS.bytes >> 20} MiB in it`);
    const name = new TextDecoder().decode(new Uint8Array(view.buffer, at + 46, path));
    entries.set(name, () => read(file, name, { flags, method, crc, stored, bytes, offset }));
    at += 46 + path + extra + comment;
  }
  return entries;
}

async function read(file, name, { flags, method, crc, stored, bytes, offset }) {
  if (flags & 1 || ![0, 8].includes(method)) throw new Error(`${name} is encrypted, or compressed in a rare way`);
  const head = new DataView(await file.slice(offset, offset + 30).arrayBuffer());
  const whole = new Uint8Array(bytes);
  let filled = 0;
  try {
    const start = offset + 30 + head.getUint16(26, true) + head.getUint16(28, true);
    let stream = file.slice(start, start + stored).stream();
    if (method === 8) stream = stream.pipeThrough(new DecompressionStream("deflate-raw"));
    for await (const part of stream) {
      whole.set(part, filled); // throws a RangeError beyond the size that was announced
      filled += part.length;
    }
  } catch {
    filled = -1;
  }
  if (filled !== bytes || crc32(whole) !== crc) throw new Error(`${name} is damaged`);
  return new Blob([whole]);
}
