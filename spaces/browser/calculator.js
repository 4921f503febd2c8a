// The calculator of nanochat_hf/tools.py in the browser: exact fractions of BigInts, no eval. Throws one line.
const ALLOWED = "only numbers, + - * / // % ( ) and 'text'.count('part') are allowed";
const TOKEN = / *('[^'\\]*'|"[^"\\]*"|\.count\b|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w)|\/\/|[-+*\/%(),]) */y;
const abs = x => x < 0n ? -x : x, gcd = (a, b) => b ? gcd(b, a % b) : abs(a), power = k => 10n ** BigInt(k);
const floor = ([n, d]) => n / d - BigInt(n % d < 0n);
const OPERATIONS = {
  "+": ([a, b], [c, d]) => fraction(a * d + c * b, b * d), "-": ([a, b], [c, d]) => fraction(a * d - c * b, b * d),
  "*": ([a, b], [c, d]) => fraction(a * c, b * d), "/": ([a, b], [c, d]) => fraction(a * d, b * c),
  "//": (x, y) => [floor(OPERATIONS["/"](x, y)), 1n],
  "%": (x, y) => OPERATIONS["-"](x, OPERATIONS["*"](y, OPERATIONS["//"](x, y))),
};
const fail = message => { throw new Error(message) };

function fraction(n, d) { // lowest terms, d > 0
  if (!d) fail("division by zero");
  if (abs(n) > power(100) * abs(d)) fail("number too large");
  const divisor = gcd(n, d) * (d < 0n ? -1n : 1n);
  return [n / divisor, d / divisor];
}

function literal(text) {
  const [, whole, part = "", exponent = "0"] = text.match(/^(\d*)\.?(\d*)(?:e([+-]?\d+))?$/i);
  if (/^0+[1-9]\d*$/.test(text)) fail("not an expression");
  const digits = BigInt(whole + part), shift = Number(exponent) - part.length;
  const size = digits ? String(digits).length - 1 + shift : 0;
  if (Math.abs(size) > 100) fail(`number too ${size > 0 ? "large" : "small"}`);
  return digits ? fraction(digits * power(Math.max(shift, 0)), power(Math.max(-shift, 0))) : [0n, 1n];
}

function format([n, d]) { // in full if it ends within 100 digits, else 10 digits, but at least 2 decimals
  if (d === 1n) return String(n);
  const size = abs(n), whole = size > d ? String(size / d).length : 1 - String(d / size).length;
  let decimals = 0;
  while (decimals < 400 && power(decimals) % d) decimals++;
  if (decimals === 400 || decimals + whole > 100) decimals = Math.max(10 - whole, 2);
  const [scaled, rest] = [size * power(decimals) / d, 2n * (size * power(decimals) % d)];
  const digits = String(scaled + BigInt(rest > d || (rest === d && scaled % 2n))); // half to even
  const sign = n < 0n ? "-" : "", exponent = digits.length - 1 - decimals, short = digits.replace(/0+$/, "");
  if (exponent < -4) return `${sign}${short.replace(/^.(?=.)/, "$&.")}e-${String(-exponent).padStart(2, "0")}`;
  return sign + digits.padStart(decimals + 1, "0").replace(RegExp(`(.{${decimals}})$`), ".$1").replace(/\.?0+$/, "");
}

export function calculate(text) {
  text = text.trim();
  if (text.length > 200) fail("expression longer than 200 characters");
  if (!/['"]/.test(text)) text = text.replace(/(?<![\w.])\d{1,3}(,\d{3})+(?![\w,])/g, x => x.replaceAll(",", ""));
  const tokens = [];
  for (TOKEN.lastIndex = 0; TOKEN.lastIndex < text.length;) tokens.push((TOKEN.exec(text) ?? fail(ALLOWED))[1]);
  const accept = (...kinds) => kinds.includes(tokens[0]) && tokens.shift();
  const need = kind => accept(kind) || fail("not an expression");
  const string = () => /^['"]/.test(tokens[0] ?? "") ? tokens.shift().slice(1, -1) : fail(ALLOWED);
  const chain = (next, ...signs) => {
    let value = next();
    for (let sign; sign = accept(...signs);) value = OPERATIONS[sign](value, next());
    return value;
  };
  const sum = () => chain(() => chain(unary, "*", "/", "//", "%"), "+", "-");
  const unary = () => {
    if (accept("+")) return unary();
    if (accept("-")) return OPERATIONS["-"]([0n, 1n], unary());
    if (accept("(")) { const value = sum(); need(")"); return value }
    if (/^\.?\d/.test(tokens[0] ?? "")) return literal(tokens.shift());
    const [whole, , , part] = [string(), need(".count"), need("("), string(), need(")")];
    return [BigInt(part ? whole.split(part).length - 1 : [...whole].length + 1), 1n];
  };
  const value = sum();
  return tokens.length ? fail("not an expression") : format(value);
}
