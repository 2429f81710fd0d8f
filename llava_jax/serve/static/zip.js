// ZIP files: written without compression, read with or without it.

const LIMITS = { entries: 10_000, bytes: 512 << 20 };
const CRCS = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = CRCS[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Numbers as little-endian bytes: [size in bytes, number]. */
function packed(...fields) {
  return Uint8Array.from(fields.flatMap(([size, n]) => Array.from({ length: size }, (_, i) => (n / 2 ** (8 * i)) & 255)));
}

/** -> a ZIP file. `files` are of name and Blob. */
export async function zip(files) {
  const [parts, directory] = [[], []];
  let offset = 0;
  for (const { name, blob } of files) {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const path = new TextEncoder().encode(name);
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const head = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, crc32(bytes)], [4, bytes.length], [4, bytes.length]];
    const local = packed([4, 0x04034b50], ...head, [2, path.length], [2, 0]);
    const central = [[2, path.length], [2, 0], [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]];
    directory.push(packed([4, 0x02014b50], [2, 20], ...head, ...central), path);
    parts.push(local, path, bytes);
    offset += local.length + path.length + bytes.length;
  }
  const size = directory.reduce((sum, bytes) => sum + bytes.length, 0);
  const counts = [[2, 0], [2, 0], [2, files.length], [2, files.length]];
  const end = packed([4, 0x06054b50], ...counts, [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** -> Map of name to a function that reads the entry. Throws Error for what is no ZIP file, or too large a one. */
export async function unzip(file) {
  const tailStart = Math.max(0, file.size - 65_557);
  const tail = new DataView(await file.slice(tailStart).arrayBuffer());
  let end = tail.byteLength - 22;
  while (end >= 0 && tail.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("is no complete ZIP file");
  const [count, size, start] = [tail.getUint16(end + 10, true), tail.getUint32(end + 12, true), tail.getUint32(end + 16, true)];
  if (count > LIMITS.entries || start + size > tailStart + end) throw new Error("is damaged, or has too many files in it");
  const view = new DataView(await file.slice(start, start + size).arrayBuffer());
  const entries = new Map();
  let total = 0;
  for (let i = 0, at = 0; i < count; i++) {
    if (at + 46 > size || view.getUint32(at, true) !== 0x02014b50) throw new Error("has a damaged directory");
    const [flags, method] = [view.getUint16(at + 8, true), view.getUint16(at + 10, true)];
    const [crc, stored, bytes] = [16, 20, 24].map((field) => view.getUint32(at + field, true));
    const [path, extra, comment] = [28, 30, 32].map((field) => view.getUint16(at + field, true));
    if (at + 46 + path > size) throw new Error("has a damaged directory");
    const name = new TextDecoder().decode(new Uint8Array(view.buffer, at + 46, path));
    if ((total += bytes) > LIMITS.bytes) throw new Error(`has more than ${LIMITS.bytes >> 20} MiB in it`);
    const entry = { crc, stored, bytes, method, encrypted: flags & 1, offset: view.getUint32(at + 42, true) };
    entries.set(name, () => read(file, name, entry));
    at += 46 + path + extra + comment;
  }
  return entries;
}

async function read(file, name, { crc, stored, bytes, method, encrypted, offset }) {
  const head = new DataView(await file.slice(offset, offset + 30).arrayBuffer());
  if (encrypted || (method !== 0 && method !== 8)) throw new Error(`${name} is encrypted, or compressed in a rare way`);
  if (head.byteLength < 30 || head.getUint32(0, true) !== 0x04034b50) throw new Error(`${name} is damaged`);
  const start = offset + 30 + head.getUint16(26, true) + head.getUint16(28, true);
  let stream = file.slice(start, start + stored).stream();
  if (method === 8) stream = stream.pipeThrough(new DecompressionStream("deflate-raw"));
  const whole = new Uint8Array(bytes);
  let filled = 0;
  try {
    for (const reader = stream.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      whole.set(value, filled); // throws a RangeError beyond the size that was announced
      filled += value.length;
    }
  } catch {
    filled = -1;
  }
  if (filled !== bytes || crc32(whole) !== crc) throw new Error(`${name} is damaged`);
  return new Blob([whole]);
}
