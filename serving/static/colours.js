// A sequence keeps its colour, here and in the chat: it comes from the name of its request.

/** The name that an answer and its sequences have in common. */
export function requestKey(requestId) {
  return requestId.replace(/-\d+$/, "");
}

export function colourOf(requestId, seqIndex = 0) {
  let hash = 2166136261;
  for (const char of requestKey(requestId)) {
    hash = Math.imul(hash ^ char.codePointAt(0), 16777619);
  }
  const hue = ((hash >>> 0) % 24) * 15;
  const light = 50 + 7 * (seqIndex % 3);
  return `hsl(${hue} 70% ${light}%)`;
}
