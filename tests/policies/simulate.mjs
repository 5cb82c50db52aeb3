// Decides requests by policies, one of each line of stdin; a line of stdout is the decision. The rules are AWS's, as data.
import { createInterface } from "node:readline";
import { runSimulation } from "@cloud-copilot/iam-simulate";

for await (const line of createInterface({ input: process.stdin })) {
  const { action, resource, context, policies, endpoint } = JSON.parse(line);
  const decided = await runSimulation(
    {
      request: {
        action,
        principal: "arn:aws:iam::123456789012:role/who",
        resource: { resource, accountId: "123456789012" },
        contextVariables: context,
      },
      identityPolicies: policies.map((policy, i) => ({ name: `policy ${i}`, policy })),
      vpcEndpointPolicies: endpoint ? [{ name: "endpoint", policy: endpoint }] : undefined,
      serviceControlPolicies: [],
      resourceControlPolicies: [],
    },
    {},
  );
  const ignored = decided.result?.ignoredContextKeys ?? [];
  console.log(JSON.stringify({ result: decided.overallResult, errors: decided.errors, ignored }));
}
